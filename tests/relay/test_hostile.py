"""Whatever one participant sends, the relay keeps serving the others, and its process keeps running."""

from __future__ import annotations

import asyncio
import os
import random

import aiohttp
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from relay.app import Relay
from relay.settings import RelaySettings
from shared.protocol import MAX_RELAY_MESSAGE_BYTES
from tests.relay.parties import announced, member, party, soon, stranger, until


async def still_serves(relay: Relay) -> None:
    """Two strangers meet, one announces, the other finds it and gets a frame."""
    async with party(relay) as ann, party(relay) as bob:
        record = announced(ann.identity)
        await ann.client.announce(record)
        await ann.client.send_frame(bob.id, b"hello")
        assert await soon(bob.heard.frames) == (ann.id, b"hello")
        assert record in await bob.client.lookup()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "hello",
        '{"type":"lookup"}',
        '{"type":"lookup","request":-1}',
        '{"type":"lookup","request":1,"model":""}',
        '{"type":"announce","record":{"body":"{}","signature":"00"}}',
        '{"type":"announce","record":{"body":"{}","signature":"' + "0" * 128 + '"}}',
        '{"type":"signal","receiver":"nobody","record":{"body":"","signature":"' + "0" * 128 + '"}}',
        '{"type":"welcome","address":"","stun_port":0}',
        "[" * 50_000,
        "\\ud800",
        '{"type":"lookup","request":1,"model":"\\ud800"}',
        " " * (MAX_RELAY_MESSAGE_BYTES - 1),
    ],
    ids=lambda text: text[:40],
)
async def test_malformed_messages_are_denied_and_the_connection_stays(relay: Relay, text: str) -> None:
    async with member(relay) as wire:
        await wire.socket.send_str(text)
        denied = await wire.denied()
        assert denied.reason and not denied.fatal

        await wire.socket.send_str('{"type":"lookup","request":5}')
        assert await wire.hear()
    await still_serves(relay)


async def test_a_message_that_is_too_long_ends_the_connection_with_a_sentence(relay: Relay) -> None:
    async with member(relay) as wire:
        await wire.socket.send_str(" " * (MAX_RELAY_MESSAGE_BYTES + 1))
        denied = await wire.denied()
        assert denied.fatal and f"may have {MAX_RELAY_MESSAGE_BYTES} bytes" in denied.reason
        assert await wire.ended() == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
    await still_serves(relay)


@pytest.mark.parametrize("send", ["send_str", "send_bytes"])
async def test_a_huge_message_is_never_taken_in(relay: Relay, send: str) -> None:
    async with member(relay) as wire:
        huge = "x" * (3 << 20) if send == "send_str" else bytes(3 << 20)
        # The relay may hang up before all of it is out.
        await asyncio.gather(getattr(wire.socket, send)(huge), return_exceptions=True)
        received = await asyncio.wait_for(wire.socket.receive(), 5)
        assert received.type is not aiohttp.WSMsgType.TEXT
    await still_serves(relay)


async def test_bytes_that_are_no_websocket_end_the_connection(relay: Relay) -> None:
    for rubbish in (b"\xff" * 100, b"\x81\xff" + b"\xff" * 8, b"\xc1\x80\0\0\0\0", os.urandom(500)):
        async with member(relay) as wire:
            transport = wire.socket._response.connection.transport  # type: ignore[union-attr]
            assert isinstance(transport, asyncio.WriteTransport)
            transport.write(rubbish)
            transport.write(bytes(2000))
            await asyncio.wait_for(wire.socket.receive(), 5)
    await still_serves(relay)


async def test_bytes_that_are_no_http_are_no_trouble(relay: Relay) -> None:
    for rubbish in (
        b"\0" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"A" * 70_000,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(rubbish)
        writer.write_eof()
        await asyncio.wait_for(reader.read(1 << 20), 5)
        writer.close()
    await still_serves(relay)


async def test_connections_that_end_at_any_moment_leave_nothing_behind(relay: Relay) -> None:
    chance = random.Random(7)
    for _ in range(30):
        async with stranger(relay) as wire:
            if chance.random() < 0.7:
                await wire.login()
            if chance.random() < 0.7:
                await wire.socket.send_bytes(bytes(40))
            wire.die()
    await until(lambda: relay.meeting.connections == 0)
    assert len(relay.meeting.participants) == 0


async def test_a_mistake_of_ours_costs_one_connection(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with member(relay) as wire:
        with monkeypatch.context() as broken:
            broken.setattr(relay.meeting.registry, "live", lambda *_: 1 / 0)
            await wire.socket.send_str('{"type":"lookup","request":1}')
            await asyncio.wait_for(wire.socket.receive(), 5)
        await until(lambda: relay.meeting.connections == 0)
    assert "ZeroDivisionError" in caplog.text  # and it is not kept quiet
    await still_serves(relay)


@hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.randoms(use_true_random=False),
    logged_in=st.booleans(),
    messages=st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.text(max_size=200),
            st.builds(
                lambda kind, rest: f'{{"type":"{kind}","request":1,"receiver":"{"0" * 64}"{rest}',
                st.sampled_from(["login", "announce", "lookup", "signal", "gone"]),
                st.sampled_from(["}", ',"watch":true}', ',"record":{}}', ',"record":null}', ""]),
            ),
        ),
        max_size=40,
    ),
)
def test_any_mixture_of_messages(seed: random.Random, logged_in: bool, messages: list[bytes | str]) -> None:
    async def scene() -> None:
        async with Relay(RelaySettings(port=0, stun=False)) as relay:
            async with (member if logged_in else stranger)(relay) as wire:
                for message in messages:
                    sending = (
                        wire.socket.send_str(message)
                        if isinstance(message, str)
                        else wire.socket.send_bytes(wire.identity.id.encode()[:32] + message)
                    )
                    await asyncio.gather(sending, return_exceptions=True)
                if seed.random() < 0.5:
                    wire.die()
            await still_serves(relay)

    asyncio.run(scene())
