"""The swarm as the page sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from shared.channel import PathReport
from shared.protocol import PeerState
from tests.harness.fake_swarm import FakeRelay, FakeSwarm
from web.swarm_view import LOOK_AGAIN_S, SHORTEST_S, swarm_view

Json = dict[str, Any]


async def test_the_view_tells_relay_models_and_peers(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.serve("oak", layers=8, eve=(2, 4))
    swarm.link("ann", "direct", 12.345)
    swarm.reports["ann"] = PathReport("data channel", 12.345, 3_000_000, "socket: no answer")
    async with http.get("/api/swarm") as response:
        view = await response.json()
    assert view["relay"] == {"url": swarm.relay.url, "connected": True}
    petal, oak = view["models"]
    assert (petal["model"], petal["coverage"], petal["gaps"], petal["covered"]) == (
        "petal",
        [1, 1, 1, 1],
        [],
        True,
    )
    assert (oak["coverage"], oak["gaps"], oak["covered"]) == (
        [0, 0, 1, 1, 0, 0, 0, 0],
        [[0, 2], [4, 8]],
        False,
    )
    assert oak["layer_count"] == 8
    ann, bob, eve = view["peers"]
    assert ann == {
        "peer": swarm.id("ann"),
        "name": "ann",
        "model": "petal",
        "artefact": petal["artefact"],
        "start": 0,
        "end": 2,
        "state": "serving",
        "dtype": "float16",
        "device": "cpu",
        "kv_tokens_free": 10_000,
        "ms_per_layer": None,
        "throughput": None,
        "sessions": 0,
        "path": "direct",
        "rtt_ms": 12.3,
        "path_words": "data channel, 12.3 ms there and back, 3.0 MB/s (socket: no answer)",
        "path_rests": False,
    }
    assert (bob["path"], bob["rtt_ms"], bob["path_words"]) == (None, None, None)
    assert eve["model"] == "oak"


async def test_with_several_relays_one_that_is_reached_is_enough(swarm: FakeSwarm) -> None:
    other = FakeRelay()
    other.url = "http://127.0.0.1:2"
    swarm.relays.append(other)
    swarm.relay.connected.clear()
    view = swarm_view(swarm)
    assert view["relay"] == {"url": "http://127.0.0.1:1", "connected": True}
    assert view["relays"] == [
        {"url": "http://127.0.0.1:1", "connected": False},
        {"url": "http://127.0.0.1:2", "connected": True},
    ]
    other.connected.clear()
    assert not swarm_view(swarm)["relay"]["connected"]


async def test_peers_that_join_or_drain_are_shown_but_cover_nothing(swarm: FakeSwarm) -> None:
    states: list[PeerState] = ["joining", "draining"]
    for state in states:
        swarm.announce("ann", "petal", 0, 2, state=state)
        view = swarm_view(swarm)
        assert view["peers"][0]["state"] == state
        assert view["models"][0]["gaps"] == [[0, 2]]


async def views(response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
    """The events of a stream, without its comments."""
    while event := await response.content.readuntil(b"\n\n"):
        if event.startswith(b"data: "):
            yield orjson.loads(event.removeprefix(b"data: "))


async def test_watchers_see_every_change(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    async with http.get("/api/swarm/events") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        events = views(response)
        assert (await anext(events))["models"][0]["covered"]
        swarm.leave("bob")
        assert (await anext(events))["models"][0]["gaps"] == [[2, 4]]
        swarm.relay.connected.clear()  # told by nobody, so it is noticed within a second
        assert not (await anext(events))["relay"]["connected"]


async def test_many_changes_at_once_are_one_view(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    async with http.get("/api/swarm/events") as response:
        events = views(response)
        await anext(events)
        for number in range(200):
            swarm.announce(f"peer-{number}", "petal", 0, 4)
        counts = [len((await anext(events))["peers"])]
        while counts[-1] < 202:
            counts.append(len((await anext(events))["peers"]))
        assert len(counts) <= 2


async def test_a_quiet_swarm_keeps_its_watchers(http: aiohttp.ClientSession) -> None:
    async with http.get("/api/swarm/events") as response:
        await response.content.readuntil(b"\n\n")
        assert await response.content.readuntil(b"\n\n") == b": keepalive\n\n"


def test_a_view_is_a_few_per_second_at_most() -> None:
    assert SHORTEST_S >= 0.2 and LOOK_AGAIN_S <= 2
