"""Whatever a client sends, the answer is an answer or says what was wrong: never a fault of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.fake_swarm import FakeSwarm
from tests.web.api import CHAT
from web.app import Gateway, GatewaySettings

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
good_fields: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("petal"),
    "messages": st.lists(messages, min_size=1, max_size=3),
    "stream": st.booleans() | st.none(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | st.none(),
    "swarm": st.fixed_dictionaries({"route": st.booleans()}) | st.none(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=4) | st.none(),
    "tools": st.lists(st.dictionaries(st.text(max_size=4), anything, max_size=2), max_size=2),
    "response_format": st.dictionaries(st.just("type"), anything),
    "tool_choice": st.just("auto"),
    "logprobs": st.booleans(),
    "temperature": st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(-1, 2**63),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "repetition_penalty": st.floats(0.1, 2),
    "max_tokens": st.integers(1, 2**63),
    "max_completion_tokens": st.integers(1, 9),
    "n": st.just(1),
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


class Asker:
    """A gateway that lives in a loop of its own, since hypothesis calls plain functions."""

    def __init__(self, runner: asyncio.Runner, gateway: Gateway, http: aiohttp.ClientSession) -> None:
        self._runner = runner
        self.gateway = gateway
        self._http = http

    def post(self, body: Any) -> tuple[int, str]:  # noqa: ANN401
        return self._runner.run(self._post(body))

    async def _post(self, body: Any) -> tuple[int, str]:  # noqa: ANN401
        async with self._http.post(CHAT, json=body) as response:
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


@settings(max_examples=100, deadline=None)
@given(good_bodies | spoiled_bodies | wild_bodies | anything)
def test_any_body_is_answered_or_refused(asker: Asker, body: Any) -> None:  # noqa: ANN401
    status, answer = asker.post(body)
    assert status in (200, 400, 404), answer
    if status == 200 and answer.startswith("data: "):
        assert answer.endswith("data: [DONE]\n\n"), answer
