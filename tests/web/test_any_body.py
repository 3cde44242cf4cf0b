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
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "king"])
contents = st.text(max_size=20) | st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url"])}, optional={"text": st.text(max_size=9)}
    ),
    max_size=2,
)
calls = st.lists(
    st.dictionaries(
        st.sampled_from(["id", "type", "function"]), anything | st.just({"arguments": "{}"}), max_size=3
    ),
    max_size=2,
)
messages = st.fixed_dictionaries(
    {"role": roles | anything, "content": contents | anything},
    optional={"name": anything, "tool_calls": calls | anything, "tool_call_id": anything},
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["petal", "oak", "../petal"]) | anything,
        "messages": st.lists(messages, max_size=3) | anything,
        "stream": st.booleans() | anything,
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | anything,
        "swarm": st.fixed_dictionaries({"route": st.booleans()}) | anything,
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5) | anything,
        "tools": st.lists(st.dictionaries(st.text(max_size=4), anything, max_size=2), max_size=2) | anything,
        "response_format": st.fixed_dictionaries({"type": anything}) | anything,
        **dict.fromkeys(["temperature", "top_p", "min_p", "top_k", "seed", "repetition_penalty"], anything),
        **dict.fromkeys(["max_tokens", "max_completion_tokens", "n", "logprobs", "tool_choice"], anything),
    },
)
good_bodies = st.builds(
    lambda body, extra: {**extra, **body},
    st.fixed_dictionaries({
        "model": st.just("petal"),
        "messages": st.lists(
            st.fixed_dictionaries({"role": roles, "content": contents, "tool_calls": calls}),
            min_size=1,
            max_size=2,
        ),
    }),
    bodies,
)  # fmt: skip


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


@settings(max_examples=150, deadline=None)
@given(bodies | good_bodies | anything)
def test_any_body_is_answered_or_refused(asker: Asker, body: Any) -> None:  # noqa: ANN401
    status, answer = asker.post(body)
    assert status in (200, 400, 404), answer
    if status == 200 and answer.startswith("data: "):
        assert answer.endswith("data: [DONE]\n\n"), answer
