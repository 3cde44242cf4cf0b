"""What the gateway remembers of the last hour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest

from tests.harness.fake_swarm import FakeSwarm
from web.app import Gateway, GatewaySettings
from web.history import EVERY_S, KEPT, MOST_MODELS, History, sample


def peer(start: int, end: int, **fields: Any) -> Any:  # noqa: ANN401
    told = {"state": "serving", "throughput": 100.0, "kv_tokens_free": 1000, "sessions": 1, **fields}
    return SimpleNamespace(start=start, end=end, **told)


def model(*peers: object, artefact: str = "a", layer_count: int = 4) -> Any:  # noqa: ANN401
    return SimpleNamespace(artefact=artefact, layer_count=layer_count, peers=list(peers))


def swarm_of(models: Sequence[object]) -> Any:  # noqa: ANN401
    return SimpleNamespace(directory=SimpleNamespace(models=lambda: models))


def test_the_weakest_layer_is_what_the_swarm_can_do() -> None:
    peers = [
        peer(0, 2, throughput=400.0, kv_tokens_free=3000),
        peer(2, 4, throughput=100.0, kv_tokens_free=500, sessions=2),
        peer(3, 4, throughput=90.0, kv_tokens_free=700),
        peer(0, 4, throughput=9000.0, state="joining"),
    ]
    found = sample(cast(Any, model(*peers)), at=12.34)
    # Layers 0–2 take 200 tokens a second through both, layer 2 only 50, layer 3 has 50 and 90.
    assert (found.tokens_per_s, found.kv_tokens_free) == (50, 500)
    assert (found.peers, found.sessions, found.at) == (3, 3, 12.3)


def test_a_layer_that_nobody_serves_means_none_at_all() -> None:
    found = sample(cast(Any, model(peer(0, 3))), at=0)
    assert (found.tokens_per_s, found.kv_tokens_free, found.peers) == (0, 0, 1)


def test_an_hour_is_kept_and_then_forgotten() -> None:
    now = 0.0
    models = [model(peer(0, 4))]
    history = History(cast(Any, swarm_of(models)), clock=lambda: now)
    for number in range(KEPT + 50):
        now = number * EVERY_S
        history.look()
    seen = history.view()["a"]
    assert len(seen["at"]) == len(seen["peers"]) == KEPT
    assert seen["at"][-1] == now

    models.clear()
    now += KEPT * EVERY_S + 1
    history.look()
    assert history.view() == {}


def test_invented_models_do_not_fill_the_memory() -> None:
    models = [model(artefact=str(number)) for number in range(MOST_MODELS + 10)]
    history = History(cast(Any, swarm_of(models)))
    history.look()
    assert len(history.view()) == MOST_MODELS


@pytest.mark.asyncio
async def test_the_gateway_tells_it(tmp_path: Path) -> None:
    swarm = FakeSwarm()
    swarm.serve("petal", ann=(0, 2), bob=(2, 4))
    async with (
        Gateway(GatewaySettings(data_dir=tmp_path), swarm) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
        http.get("/api/history") as response,
    ):
        told = await response.json()
    (hour,) = told.values()
    assert hour.keys() == {"at", "peers", "sessions", "tokens_per_s", "kv_tokens_free"}
    assert hour["peers"] == [2]
