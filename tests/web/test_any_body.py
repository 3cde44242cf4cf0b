"""Whatever a client sends, the answer is an answer or says what was wrong: never a fault of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.fake_swarm import FakeSwarm
from tests.web.api import CHAT
from web.app import Gateway, GatewaySettings
from web.openai.openapi import openapi

SLOW = [HealthCheck.too_slow]
"""A busy machine takes its time to make up bodies."""

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
contents = st.text(max_size=20) | st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=9)), max_size=2
)
calls = st.lists(
    st.dictionaries(
        st.sampled_from(["id", "type", "function"]), anything | st.just({"arguments": "{}"}), max_size=3
    ),
    max_size=2,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": contents},
    optional={"name": st.text(max_size=5), "tool_calls": calls, "tool_call_id": st.just("1")},
)
# Schemas that look like some, and some that are none.
schemas = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "array", "string", "rose"]),
        "properties": st.dictionaries(st.text(max_size=3), st.just({"type": "integer"}), max_size=2),
        "items": anything,
        "$ref": st.sampled_from(["#", "#/x", "http://x"]),
        "pattern": st.text("(a|b)*+[{", max_size=8),
        "anyOf": st.just([{"type": "null"}]),
        "enum": st.lists(anything, max_size=2),
        "x-guidance": anything,
    },
)
NAMED = {"type": "function", "function": {"name": "f"}}
tools = st.builds(
    lambda name, parameters: {"type": "function", "function": {"name": name, "parameters": parameters}},
    st.sampled_from(["f", 'g"\\', "é"]),
    schemas,
)
flat_tools = st.fixed_dictionaries({"type": st.just("function"), "name": st.just("f"), "parameters": schemas})
their_tools = st.fixed_dictionaries({"name": st.just("f"), "input_schema": schemas})
good_fields: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("petal"),
    "messages": st.lists(messages, min_size=1, max_size=3),
    "stream": st.booleans() | st.none(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | st.none(),
    "swarm": st.fixed_dictionaries({"route": st.booleans()}) | st.none(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=4) | st.none(),
    "tools": st.lists(tools, max_size=2),
    "response_format": st.sampled_from(["text", "json_object"]).map(lambda kind: {"type": kind})
    | st.builds(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}, schemas),
    "tool_choice": st.sampled_from(["auto", "none", "required"]) | st.just(NAMED),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "logit_bias": st.dictionaries(st.integers(0, 999).map(str), st.floats(-100, 100), max_size=2),
    "temperature": st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(-1, 2**63),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "repetition_penalty": st.floats(0.1, 2),
    "max_tokens": st.integers(1, 2**63),
    "max_completion_tokens": st.integers(1, 9),
    "n": st.integers(1, 4),
}
needed = {name: good_fields.pop(name) for name in ("model", "messages")}
good_bodies = st.fixed_dictionaries(needed, optional=good_fields)
# One wrong field in a good body gets further than a body that is wrong all over.
spoiled_bodies = st.builds(
    lambda body, name, value: {**body, name: value},
    good_bodies,
    st.sampled_from([*needed, *good_fields]),
    anything,
)
wild_bodies = st.fixed_dictionaries({}, optional=dict.fromkeys([*needed, *good_fields], anything))


# The other dialects and helpers: fields that are good, and of which one may be spoiled.
prompts = (
    st.text(max_size=9)
    | st.lists(st.integers(0, 500), max_size=4)
    | st.lists(st.text(max_size=4), max_size=3)
)
items = st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "x"])},
    optional={
        "role": st.just("user"),
        "content": contents,
        "call_id": st.just("1"),
        "name": st.text(max_size=3),
        "arguments": st.text(max_size=4) | st.just("{}"),
        "output": st.text(max_size=4),
    },
)
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"])},
    optional={
        "text": st.text(max_size=4),
        "id": st.just("1"),
        "name": st.just("f"),
        "input": st.dictionaries(st.text(max_size=3), anything, max_size=2),
        "tool_use_id": st.just("1"),
        "content": st.text(max_size=4),
    },
)
turns = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant"]),
        "content": st.text(max_size=9) | st.lists(blocks, max_size=3),
    }
)
DIALECTS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/completions": {
        "prompt": prompts,
        "echo": st.booleans(),
        "logprobs": st.integers(0, 20) | st.none(),
        "max_tokens": st.integers(0, 9),
        "stop": st.text(max_size=2),
        "n": st.integers(1, 4),
        "stream": st.booleans(),
    },
    "/v1/responses": {
        "input": st.text(max_size=9) | st.lists(items, max_size=3),
        "instructions": st.text(max_size=4),
        "tools": st.lists(flat_tools, max_size=2),
        "tool_choice": st.sampled_from(["auto", "required"]) | st.just({"type": "function", "name": "f"}),
        "text": st.builds(lambda schema: {"format": {"type": "json_schema", "schema": schema}}, schemas),
        "max_output_tokens": st.integers(0, 9),
        "stream": st.booleans(),
    },
    "/v1/messages": {
        "messages": st.lists(turns, max_size=3),
        "max_tokens": st.integers(0, 9),
        "system": st.text(max_size=4),
        "stop_sequences": st.lists(st.text(max_size=2), max_size=2),
        "tools": st.lists(their_tools, max_size=2),
        "tool_choice": st.sampled_from(["auto", "any", "none"]).map(lambda kind: {"type": kind}),
        "stream": st.booleans(),
    },
    "/tokenize": {"prompt": st.text(max_size=9), "messages": st.lists(messages, max_size=2)},
    "/detokenize": {"tokens": st.lists(st.integers(0, 500), max_size=4)},
}


COUNT = "/v1/messages/count_tokens"


@st.composite
def dialect_bodies(draw: st.DrawFn) -> tuple[str, Any]:
    path = draw(st.sampled_from([*DIALECTS, COUNT]))
    fields = DIALECTS[path.removesuffix("/count_tokens")]
    body = draw(st.fixed_dictionaries({"model": st.just("petal")}, optional=fields))
    if draw(st.booleans()):
        body[draw(st.sampled_from(["model", *fields]))] = draw(anything)
    return path, body


class Asker:
    """A gateway that lives in a loop of its own, since hypothesis calls plain functions."""

    def __init__(self, runner: asyncio.Runner, gateway: Gateway, http: aiohttp.ClientSession) -> None:
        self._runner = runner
        self.gateway = gateway
        self._http = http

    def post(self, body: Any, path: str = CHAT) -> tuple[int, str]:  # noqa: ANN401
        return self._runner.run(self._post(body, path))

    async def _post(self, body: Any, path: str) -> tuple[int, str]:  # noqa: ANN401
        async with self._http.post(path, json=body) as response:
            return response.status, await response.text()


@pytest.fixture(scope="module")
def asker(files: dict[str, bytes], tokenizer: Any, data_dir: Path) -> Iterator[Asker]:  # noqa: ANN401
    async def start() -> tuple[Gateway, aiohttp.ClientSession]:
        swarm = FakeSwarm(tokenizer, files)
        swarm.serve("petal", ann=(0, 2), bob=(2, 4))
        gateway = await Gateway(GatewaySettings(data_dir=data_dir), swarm).__aenter__()
        return gateway, aiohttp.ClientSession(gateway.url)

    async def stop(gateway: Gateway, http: aiohttp.ClientSession) -> None:
        await http.close()
        await gateway.__aexit__(None, None, None)

    with asyncio.Runner() as runner:
        gateway, http = runner.run(start())
        yield Asker(runner, gateway, http)
        runner.run(stop(gateway, http))


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(good_bodies | spoiled_bodies | wild_bodies | anything)
def test_any_body_is_answered_or_refused(asker: Asker, body: Any) -> None:  # noqa: ANN401
    status, answer = asker.post(body)
    assert status in (200, 400, 404), answer
    if status == 200 and answer.startswith("data: "):
        assert answer.endswith("data: [DONE]\n\n"), answer


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@given(dialect_bodies())
def test_any_body_is_answered_or_refused_in_every_dialect(asker: Asker, asked: tuple[str, Any]) -> None:
    path, body = asked
    status, answer = asker.post(body, path)
    assert status in (200, 400, 404), answer


def test_every_address_that_takes_a_body_is_described() -> None:
    described = openapi()["paths"]
    assert {path for path, methods in described.items() if "post" in methods} == {CHAT, *DIALECTS, COUNT}
