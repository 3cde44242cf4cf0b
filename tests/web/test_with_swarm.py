"""The API before true peers: what it tells of likelihoods and schemas is what the unsplit model would say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest

from peer.settings import DEMO_MODEL
from tests.harness.swarm import Swarm
from tests.web.api import Json
from web.app import Gateway, GatewaySettings

SCHEMA: Json = {
    "type": "object",
    "properties": {
        "petals": {"type": "integer", "minimum": 1, "maximum": 90},
        "colour": {"enum": ["red", "blue"]},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["petals", "colour", "words"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> Path:
    return Path(DEMO_MODEL)


@pytest.fixture
async def asked(model: Path, tmp_path: Path) -> AsyncIterator[tuple[aiohttp.ClientSession, Swarm]]:
    async with Swarm(model) as swarm:
        await swarm.start(ann=(0, 3), bob=(3, 6))
        settings = GatewaySettings(data_dir=tmp_path)
        timeout = aiohttp.ClientTimeout(120)
        async with (
            Gateway(settings, swarm.client) as gateway,
            aiohttp.ClientSession(gateway.url, timeout=timeout) as http,
        ):
            yield http, swarm


async def post(http: aiohttp.ClientSession, path: str, **fields: Any) -> Json:  # noqa: ANN401
    async with http.get("/v1/models") as response:
        name = (await response.json())["data"][0]["id"]
    async with http.post(path, json={"model": name, **fields}) as response:
        answer: Json = await response.json()
        assert response.status == 200, answer
    return answer


async def test_what_the_api_tells_is_what_the_unsplit_model_says(
    asked: tuple[aiohttp.ClientSession, Swarm],
) -> None:
    http, swarm = asked
    tokens = (await post(http, "/tokenize", prompt="The petals of a flower are held by each other. " * 8))[
        "tokens"
    ]
    # lm-eval's question: contexts and continuations as tokens, two in one request.
    prompts = [tokens, tokens[:20]]
    answer = await post(
        http, "/v1/completions", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        told = choice["logprobs"]["token_logprobs"]
        expected = swarm.logprobs(prompt)
        likely = [float(expected[place, token]) for place, token in enumerate(prompt[1:])]
        assert told[1:-1] == pytest.approx(likely, abs=1e-3)
        assert told[-1] == pytest.approx(float(expected[-1].max()), abs=1e-3)
        greedy = [int(row.argmax()) == token for row, token in zip(expected, prompt[1:], strict=False)]
        tops = choice["logprobs"]["top_logprobs"][1:-1]
        assert [mine == max(top.values()) for mine, top in zip(told[1:-1], tops, strict=True)] == greedy

    wanted = {"type": "json_schema", "json_schema": {"name": "flower", "schema": SCHEMA}}
    messages = [{"role": "user", "content": "What is a corolla?"}]
    for seed in range(3):
        answer = await post(
            http, "/v1/chat/completions", messages=messages, response_format=wanted, seed=seed, max_tokens=300
        )
        assert answer["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMA)


async def test_an_answer_that_goes_on_is_the_one_that_was_not_cut(
    asked: tuple[aiohttp.ClientSession, Swarm],
) -> None:
    http, _ = asked
    question = {"role": "user", "content": "What is Corolla?"}

    async def answer(count: int, *more: Json, **fields: Any) -> Json:  # noqa: ANN401
        wishes = {"temperature": 0, "max_tokens": count, **fields}
        said = await post(http, "/v1/chat/completions", messages=[question, *more], **wishes)
        choice: Json = said["choices"][0]
        return choice

    whole = await answer(400)
    first = await answer(9)
    assert first["finish_reason"] == "length"
    said = first["message"]["content"].rstrip()
    rest = await answer(400, {"role": "assistant", "content": said}, continue_final_message=True)

    assert said + rest["message"]["content"] == whole["message"]["content"]
    assert rest["finish_reason"] == "stop"
