"""The read-only pages: who serves what, and whether the relay is well."""

from __future__ import annotations

import time
from typing import Any

import aiohttp

from relay.app import Relay
from shared.protocol import Announce
from tests.relay.parties import announced, member, party, until


async def page(relay: Relay, path: str) -> tuple[aiohttp.ClientResponse, Any]:
    async with aiohttp.ClientSession() as http, http.get(relay.url + path) as response:
        body = await (response.json() if response.content_type == "application/json" else response.text())
        return response, body


async def test_the_swarm_page_tells_coverage_gaps_and_peers(relay: Relay) -> None:
    async with party(relay) as ann, party(relay) as bob:
        now = time.time() - 5
        await ann.client.announce(announced(ann.identity, now, name="ann", start=0, end=4))
        await bob.client.announce(
            announced(bob.identity, now, name="<b>bob</b>", start=3, end=6, state="serving", dtype="bfloat16")
        )
        await ann.client.lookup()
        await bob.client.lookup()
        response, swarm = await page(relay, "/api/swarm")

    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in response.headers
    (model,) = swarm["models"]
    assert model["model"] == "demo" and model["layer_count"] == 8
    assert model["coverage"] == [1, 1, 1, 2, 1, 1, 0, 0]
    assert model["gaps"] == [[6, 8]]
    first, second = model["peers"]
    assert first.pop("renewed_s_ago") >= 5 and 30 < first.pop("expires_in_s") <= 40
    assert first == {
        "peer": ann.id,
        "name": "ann",
        "start": 0,
        "end": 4,
        "state": "serving",
        "dtype": "float32",
        "device": "cpu",
        "context_length": 2048,
        "kv_tokens_free": 1000,
        "ms_per_layer": None,
        "connected": True,
    }
    assert second["name"] == "<b>bob</b>" and second["dtype"] == "bfloat16"


async def test_only_serving_peers_that_are_here_cover_layers(relay: Relay) -> None:
    async with party(relay) as ann, member(relay) as bob:
        await ann.client.announce(announced(ann.identity, state="joining"))
        await bob.say(Announce(announced(bob.identity, start=4, end=8)))
        await until(lambda: len(relay.meeting.registry) == 2)
        assert (await page(relay, "/api/swarm"))[1]["models"][0]["coverage"] == [0] * 4 + [1] * 4

        bob.die()
        await until(lambda: len(relay.meeting.participants) == 1)
        _, swarm = await page(relay, "/api/swarm")
    (model,) = swarm["models"]
    assert model["coverage"] == [0] * 8
    assert [peer["connected"] for peer in model["peers"]] == [True, False]


async def test_an_empty_swarm_is_an_empty_list(relay: Relay) -> None:
    assert (await page(relay, "/api/swarm"))[1] == {"models": []}


async def test_health_counts_what_happened(relay: Relay) -> None:
    async with party(relay) as ann:
        await ann.client.announce(announced(ann.identity))
        await ann.client.send_frame(ann.id, b"12345")
        await ann.client.lookup()
        response, health = await page(relay, "/healthz")

    assert response.status == 200 and health["status"] == "ok"
    assert health["participants"] == health["announcements"] == health["logins"] == 1
    assert health["frames_forwarded"] == 1 and health["bytes_forwarded"] == 5
    assert health["stun_port"] == relay.stun_port


async def test_the_front_page_says_what_this_is(relay: Relay) -> None:
    response, text = await page(relay, "/")
    assert response.content_type == "text/plain" and "Corolla relay" in text
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]


async def test_a_plain_request_to_the_websocket_is_a_bad_request(relay: Relay) -> None:
    assert (await page(relay, "/ws"))[0].status == 400
