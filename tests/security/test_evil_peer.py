"""Participants that mean harm, row by row of the threat table in docs/security.md.

What a hostile asker says to a peer stands in tests/peer/serving/test_hostile_peer.py, what anyone says to a
relay in tests/relay/test_hostile.py and test_load.py; here is what no other test tells.
"""

from __future__ import annotations

import asyncio
import re
import tomllib
from pathlib import Path

import aiohttp
import pytest

from relay.app import Relay
from relay.sessions import FRAME_COST_BYTES
from relay.settings import UNLIMITED, Rate, RelaySettings
from shared.client.session import Drawn
from shared.identity import Identity, PeerId
from shared.protocol import Announce, Announcement, Decline, Open, Opened, RouteSpan, Sampling, decode
from tests.harness.swarm import Swarm, tokens
from tests.peer.serving.parties import LAYERS, PROMPT, expected_tokens, model_directory
from tests.peer.serving.test_hostile_peer import mallory
from tests.relay.parties import announced, member, party, soon, stranger, until
from tests.shared.channel.ends import ends
from tests.shared.channel.ends import until as until_channel

LONG = 100
"""More tokens than the ring may run ahead of who asks."""


# ---------------------------------------------------------------- row 3: memory


async def test_row_3_who_opens_sessions_until_refused_takes_no_more_than_there_is() -> None:
    """And the answer that was under way before is not hurt, nor does anything stay taken afterwards."""
    async with Swarm(model_directory(), direct=False, kv_bytes=2_000_000) as swarm, mallory(swarm) as wicked:
        await swarm.start(ann=(0, LAYERS))
        ann = swarm.peers["ann"]
        answer = swarm.ask(PROMPT, new=LONG)
        events: list[object] = [await anext(answer)]

        answers = []
        for number in range(40):
            await wicked.say(ann, greedy_open(ann.identity.id, ann.artefact, number))
            answers.append(await asyncio.wait_for(wicked.heard.get(), 10))
            assert ann.kv_budget.reserved_bytes <= ann.kv_budget.total_bytes

        refused = [one for one in answers if isinstance(one, Decline)]
        assert refused and all(one.code == "busy" and one.retry_after_s > 0 for one in refused)
        assert sum(isinstance(one, Opened) for one in answers) + len(refused) == 40
        events += [event async for event in answer]
        assert tokens([event for event in events if isinstance(event, Drawn)]) == expected_tokens(
            tuple(PROMPT), LONG
        )


def greedy_open(peer: PeerId, artefact: str, number: int) -> Open:
    """As many positions as the model has, and not one step to follow."""
    return Open(
        session=f"{number:032x}",
        epoch=0,
        artefact=artefact,
        route=[RouteSpan(peer, 0, LAYERS)],
        index=0,
        max_tokens=500,
        prompt_length=1,
        credit=1,
        sampling=Sampling(),
    )


# ---------------------------------------------------------------- row 14: rate and size


async def test_row_14_many_tiny_frames_cost_as_much_as_few_large_ones() -> None:
    """60 frames without a byte in them are worth more than 50 KiB: their sender waits, and nobody else."""
    settings = RelaySettings(
        port=0, participant_bytes=Rate(1, 50 * FRAME_COST_BYTES), address_bytes=UNLIMITED
    )
    async with Relay(settings) as relay, member(relay) as ann, party(relay) as bob, party(relay) as eve:
        for _ in range(60):
            await ann.socket.send_bytes(bytes.fromhex(bob.id))
        await until(lambda: relay.meeting.counts.slowed_s > 0)
        await eve.client.send_frame(eve.id, b"quick")
        assert await soon(eve.heard.frames) == (eve.id, b"quick")
        assert bob.heard.frames.qsize() <= 51
        ann.die()  # a goodbye would wait behind its frames


# ---------------------------------------------------------------- row 15: aiohttp


def test_row_15_aiohttp_is_one_without_the_known_holes() -> None:
    """3.13.3 closed CVE-2025-69228 to -69230."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [wanted] = [need for need in project["dependencies"] if need.startswith("aiohttp")]
    floor = re.fullmatch(r"aiohttp>=(\d+)\.(\d+)(?:\.(\d+))?", wanted)
    assert floor is not None
    assert tuple(int(part or 0) for part in floor.groups()) >= (3, 13, 3)
    assert tuple(int(part) for part in aiohttp.__version__.split(".")[:3]) >= (3, 13, 3)


# ---------------------------------------------------------------- row 17: addresses


ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b|[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{0,4}){3,}")


async def test_row_17_an_announcement_carries_no_address_but_those_of_its_relays() -> None:
    async with Swarm(model_directory(), relay_count=2) as swarm:
        ann = await swarm.start_one("ann", "all")
        await ann.announce("serving")
        await swarm.until(lambda: len(swarm.client.directory.live()[0].relays) == 2)
        entry = swarm.relay.meeting.registry.get(ann.identity.id)
        assert entry is not None
        body = entry.record.body

        assert set(decode(body, Announcement).relays) == set(swarm.relay_urls)
        for url in swarm.relay_urls:
            body = body.replace(url, "")
        assert ADDRESS.findall(body) == []


async def test_row_17_the_status_pages_tell_no_address() -> None:
    async with Relay(RelaySettings(port=0)) as relay:
        identity = Identity.generate()
        async with stranger(relay, identity, **{"X-Forwarded-For": "198.51.100.7"}) as wire:
            await wire.login()
            assert (await wire.welcomed()).address == "198.51.100.7"
            await wire.say(Announce(announced(identity)))
            await until(lambda: len(relay.meeting.registry) == 1)
            pages = [await read(relay, path) for path in ("/", "/healthz", "/api/swarm")]
    assert identity.id in pages[2]
    assert [ADDRESS.findall(page) for page in pages] == [[], [], []]


async def read(relay: Relay, path: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(relay.url + path) as response:
        return await response.text()


@pytest.mark.parametrize("ann_dials", [True, False])
async def test_row_17_who_stays_on_the_relay_describes_no_address(ann_dials: bool) -> None:
    """Whatever the other side says of itself, and whichever of the two dialled."""
    async with ends() as (ann, bob):
        bob.dialer._certificate = None  # as with --relay-only
        await (ann.dialer.channel(bob.id) if ann_dials else bob.dialer.channel(ann.id))
        await until_channel(lambda: bob.id in ann.dialer.channels)
        upgrade = ann.channel_to(bob)._upgrade
        await until_channel(lambda: upgrade._remote is not None)
        assert upgrade._remote is not None and upgrade._remote.candidates == []


# ---------------------------------------------------------------- row 18: no open proxy


async def test_row_18_a_relay_forwards_to_those_who_logged_in_and_to_nobody_else(relay: Relay) -> None:
    """An id that spells an address, a peer that is announced but not here, and one that has not logged in."""
    visits = 0

    def visited(*_: object) -> None:
        nonlocal visits
        visits += 1

    listening = await asyncio.start_server(visited, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening, member(relay) as ann, stranger(relay) as waiting:
        spelled = f"127.0.0.1:{port}".encode().ljust(32, b"\0")
        for raw in (spelled, bytes.fromhex(waiting.identity.id), bytes.fromhex(Identity.generate().id)):
            await ann.socket.send_bytes(raw + b"GET / HTTP/1.1\r\n\r\n")
            gone = await ann.hear()
            assert gone.peer == raw.hex()  # type: ignore[union-attr]
        assert visits == 0 and relay.meeting.frames.forwarded == 0
        await waiting.login()  # its challenge is all that it has heard
        await waiting.welcomed()


@pytest.mark.parametrize(
    "request_line",
    [
        "CONNECT 127.0.0.1:{port} HTTP/1.1",
        "GET http://127.0.0.1:{port}/ HTTP/1.1",
        "GET //127.0.0.1:{port}/ HTTP/1.1",
        "GET /ws/127.0.0.1:{port} HTTP/1.1",
    ],
)
async def test_row_18_a_relay_is_no_http_proxy(relay: Relay, request_line: str) -> None:
    visits: list[object] = []
    listening = await asyncio.start_server(lambda *pair: visits.append(pair), "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        line = request_line.format(port=port)
        writer.write(f"{line}\r\nHost: 127.0.0.1:{relay.port}\r\nConnection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
    assert answer.split()[1] in (b"400", b"404", b"405") or b"Corolla relay" in answer  # its own front page
    assert not visits
