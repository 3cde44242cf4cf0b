"""Programs that people use already, against the gateway. Each is left out where it is not installed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from shared.errors import Busy, NoRoute, SessionFailed
from tests.harness.fake_swarm import FakeSwarm, Say
from tests.harness.tokenizers import byte_level, chat_files
from tests.web.test_tools import ARGUMENTS, CALL, HERMES, WEATHER
from web.app import Gateway, GatewaySettings

HELLO: Any = [{"role": "user", "content": "Hello"}]
TEXT = "The petals 😀 make its corolla."


@pytest.fixture
async def swarm() -> FakeSwarm:
    tokenizer = byte_level()
    swarm = FakeSwarm(tokenizer, chat_files(tokenizer, template=HERMES))
    swarm.serve("petal", ann=(0, 2), bob=(2, 4))
    return swarm


@pytest.fixture
async def gateway(swarm: FakeSwarm, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with Gateway(GatewaySettings(data_dir=tmp_path / "data", api_keys=("rose",)), swarm) as gateway:
        yield gateway


class Forecast(pydantic.BaseModel):
    city: str
    days: int


# ---------------------------------------------------------------- litellm


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network when it is imported
    return pytest.importorskip("litellm")


async def test_litellm_reads_answers_streams_and_calls(
    litellm: Any,  # noqa: ANN401
    gateway: Gateway,
    swarm: FakeSwarm,
) -> None:
    asked: dict[str, Any] = {
        "model": "openai/petal",
        "messages": HELLO,
        "api_base": f"{gateway.url}/v1",
        "api_key": "rose",
    }
    swarm.say(TEXT)
    answer = await litellm.acompletion(**asked)
    assert answer.choices[0].message.content == TEXT
    swarm.say(TEXT)
    stream = await litellm.acompletion(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]) == TEXT
    swarm.say(CALL)
    answer = await litellm.acompletion(**asked, tools=[WEATHER])
    assert answer.choices[0].message.tool_calls[0].function.arguments == ARGUMENTS


async def test_litellm_maps_our_errors_to_its_own(litellm: Any, gateway: Gateway, swarm: FakeSwarm) -> None:  # noqa: ANN401
    async def ask(**fields: Any) -> None:  # noqa: ANN401
        asked = {"model": "openai/petal", "messages": HELLO, "api_key": "rose", **fields}
        await litellm.acompletion(**asked, api_base=f"{gateway.url}/v1", max_retries=0)

    with pytest.raises(litellm.ContextWindowExceededError):
        await ask(messages=[{"role": "user", "content": "word " * 600}])
    with pytest.raises(litellm.AuthenticationError):
        await ask(api_key="lily")
    with pytest.raises(litellm.NotFoundError):
        await ask(model="openai/oak")
    swarm.script(NoRoute("no live peer serves layers 2–4 of petal"))
    with pytest.raises(litellm.ServiceUnavailableError):
        await ask()


# ---------------------------------------------------------------- instructor


@pytest.mark.parametrize("mode", ["TOOLS", "JSON", "JSON_SCHEMA"])
async def test_instructor_gets_its_objects(gateway: Gateway, swarm: FakeSwarm, mode: str) -> None:
    instructor: Any = pytest.importorskip("instructor")
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="rose") as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        swarm.say('{"city": "Ulm", "days": 3}')
        forecast = await client.chat.completions.create(
            model="petal", messages=HELLO, response_model=Forecast, max_retries=0
        )
    assert forecast.model_dump() == {"city": "Ulm", "days": 3}
    assert swarm.requests[0].sampling.grammar


# ---------------------------------------------------------------- llm


async def test_the_llm_command_answers(gateway: Gateway, swarm: FakeSwarm, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: corolla\n  model_name: petal\n  api_base: {gateway.url}/v1\n  supports_schema: true\n"
        "  api_key_name: corolla\n"
    )
    for flags, said in (
        ([], TEXT),
        (["--no-stream"], TEXT),
        (["--schema", "city, days int"], '{"city": "Ulm"}'),
    ):
        swarm.say(said)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "llm", "prompt", "-m", "corolla", "--key", "rose", *flags, "Hello",
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert out.decode().strip() == said, err.decode()
    assert swarm.requests[-1].sampling.grammar


# ---------------------------------------------------------------- openai


async def test_openai_parses_answers_by_a_schema(gateway: Gateway, swarm: FakeSwarm) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="rose") as client:
        swarm.say('{"city": "Ulm", "days": 3}')
        answer = await client.chat.completions.parse(model="petal", messages=HELLO, response_format=Forecast)
        assert answer.choices[0].message.parsed == Forecast(city="Ulm", days=3)


async def test_openai_lists_models_and_finds_one_with_a_slash(gateway: Gateway, swarm: FakeSwarm) -> None:
    swarm.serve("roses/tea-7B", ann=(0, 4))
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="rose") as client:
        assert "roses/tea-7B" in [model.id async for model in client.models.list()]
        assert (await client.models.retrieve("roses/tea-7B")).id == "roses/tea-7B"


async def test_openai_does_not_ask_again_in_vain(gateway: Gateway, swarm: FakeSwarm) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="rose", max_retries=2) as client:
        for error in (SessionFailed("peer ann could not go on: out of memory"), Busy("full", 0.01)):
            swarm.requests.clear()
            swarm.script(error)
            swarm.script(Say("now"))
            try:
                await client.chat.completions.create(model="petal", messages=HELLO, max_tokens=3)
            except openai.InternalServerError:
                assert isinstance(error, SessionFailed)
                assert len(swarm.requests) == 1
                await client.chat.completions.create(model="petal", messages=HELLO, max_tokens=3)
