"""Direct links: what we need of aiortc below its public names, what we believe of a description, retries."""

from __future__ import annotations

import asyncio
from inspect import signature

import aioice.stun
import msgspec
import pytest
from aioice import Connection
from aiortc import RTCIceGatherer

from shared.channel import channel as channel_file
from shared.channel import upgrade, webrtc
from shared.channel.webrtc import DirectLink, new_certificate
from shared.errors import ConnectionLost, ProtocolError
from shared.protocol import Describe
from tests.shared.channel.ends import both_direct, cut_direct, ends, numbered, until

FINGERPRINT = "sha-256 " + ":".join(["AB"] * 32)
HOST = "abc 1 udp 2130706431 192.0.2.9 5000 typ host"


def description(**changes: object) -> Describe:
    usual = Describe(attempt=1, ufrag="abcd", password="p" * 22, fingerprint=FINGERPRINT, candidates=[HOST])
    return msgspec.structs.replace(usual, **changes)


def link() -> DirectLink:
    return DirectLink(new_certificate(), True, None, lambda link, frame: None, lambda: None)


async def test_aiortc_still_has_what_we_use_below_its_public_names() -> None:
    assert "timeout" in signature(Connection.get_component_candidates).parameters
    assert (aioice.stun.RETRY_RTO, aioice.stun.RETRY_MAX) == (0.1, 5)
    gatherer = RTCIceGatherer(iceServers=[])
    assert gatherer._connection.ice_controlling is False
    assert gatherer._connection.stun_server is None
    direct = link()
    assert direct._dtls._task is None
    assert direct._sctp._advertised_rwnd > 0
    assert not direct.overrun
    await direct.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"ufrag": "a b"},
        {"ufrag": ""},
        {"password": "short"[:3]},
        {"fingerprint": "sha-1 AB"},
        {"fingerprint": FINGERPRINT.lower()},
        {"fingerprint": FINGERPRINT + ":AB"},
    ],
)
async def test_a_bad_description_is_refused(changes: dict[str, object]) -> None:
    direct = link()
    with pytest.raises(ProtocolError, match="no usable ICE credentials"):
        await direct.open(description(**changes))
    await direct.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "a b c d e f g h",
        HOST.replace("192.0.2.9", "printer.local"),
        HOST.replace("192.0.2.9", "127.0.0.1"),
        HOST.replace("192.0.2.9", "224.0.0.1"),
        HOST.replace("192.0.2.9", "0.0.0.0"),
        HOST.replace("udp", "tcp"),
        HOST.replace(" 5000 ", " 0 "),
        HOST.replace(" 5000 ", " 70000 "),
        HOST.replace("host", "prflx"),
        HOST.replace("abc 1", "abc 2"),
    ],
)
def test_a_candidate_that_we_would_not_send_to_is_left_out(text: str) -> None:
    _, _, candidates = webrtc._read(description(candidates=[text, HOST]))

    assert [candidate.ip for candidate in candidates] == ["192.0.2.9"]


def test_only_so_many_candidates_are_tried() -> None:
    _, _, candidates = webrtc._read(description(candidates=[HOST] * 32))

    assert len(candidates) == webrtc.MAX_CANDIDATES


async def test_an_attempt_that_leads_nowhere_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webrtc, "OPEN_TIMEOUT_S", 0.2)
    direct = link()
    await direct.describe(1)
    with pytest.raises(ConnectionLost, match="no direct link in"):
        await direct.open(description())
    await direct.close()

    assert direct.lost.is_set()


@pytest.mark.usefixtures("each_transport")
async def test_a_lost_direct_link_is_sought_again_while_messages_flow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_file, "DIRECT_SILENT_S", 0.1)
    monkeypatch.setattr(upgrade, "RETRY_LOST_S", 0.05)
    monkeypatch.setattr(upgrade, "PAUSE_S", 0.01)
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        with channel.watched():
            cut_direct(bob.channel_to(ann))
            await until(lambda: channel.direct is None)
            assert channel.path == "relayed"

            async def chat() -> None:
                for number in range(10_000):
                    await channel.send(numbered(number))
                    await asyncio.sleep(0.01)

            chatting = asyncio.create_task(chat())
            await both_direct(ann, bob)
            chatting.cancel()


async def test_a_side_that_floods_with_attempts_is_followed_at_our_own_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upgrade, "PAUSE_S", 0.1)
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        back = bob.channel_to(ann)
        for attempt in range(2, 50):
            channel._tell(channel.relayed, description(attempt=attempt))
        await until(lambda: back._upgrade._attempt == 49)
        await channel.send(numbered(1))

        assert (await bob.got()).number == 1
