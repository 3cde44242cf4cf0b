"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import aiohttp
import openai
import pytest

from tests.harness.fake_swarm import FakeSwarm


async def test_each_model_tells_its_state_in_the_swarm(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.serve("meadow/oak-7B", layers=8, context=2048, eve=(0, 4))
    models = {model.id: model async for model in await client.models.list()}
    assert models.keys() == {"petal", "meadow/oak-7B"}
    assert models["meadow/oak-7B"].model_extra == {
        "swarm": {
            "artefact": swarm.directory.find("meadow/oak-7B").artefact,
            "layers": 8,
            "covered": False,
            "gaps": [[4, 8]],
            "peers": 1,
            "context_length": 2048,
        }
    }
    assert models["petal"].owned_by == "swarm"


async def test_the_list_is_empty_while_nobody_serves(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.leave("ann", "bob")
    assert [model async for model in await client.models.list()] == []


@pytest.mark.parametrize("path", ["meadow/oak-7B", "meadow%2Foak-7B"])
async def test_a_name_may_hold_a_slash(http: aiohttp.ClientSession, swarm: FakeSwarm, path: str) -> None:
    swarm.serve("meadow/oak-7B", eve=(0, 4))
    async with http.get(f"/v1/models/{path}") as response:
        assert (await response.json())["id"] == "meadow/oak-7B"


async def test_the_official_client_finds_one(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.serve("meadow/oak-7B", eve=(0, 4))
    assert (await client.models.retrieve("meadow/oak-7B")).id == "meadow/oak-7B"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.models.retrieve("elm")
    assert missing.value.code == "model_not_found"


async def test_an_artefact_is_a_name_too(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    artefact = swarm.directory.find("petal").artefact
    assert (await client.models.retrieve(artefact)).id == "petal"
