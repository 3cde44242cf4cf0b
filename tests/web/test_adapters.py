"""Chats with `model: base+adapter`, over HTTP: what they say is what PEFT says on the unsplit model."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peer.settings import DEMO_MODEL
from tests.harness.swarm import Swarm
from tests.web.api import Json, chunks, content, error_of, post
from web.app import Gateway, GatewaySettings

Model = Any
BASE = Path(DEMO_MODEL).name
QUESTION = [{"role": "user", "content": "What is Corolla?"}]
COUNT = 12


@pytest.fixture(scope="module")
def whole() -> Model:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapted(whole: Model) -> Model:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Model = get_peft_model(copy.deepcopy(whole), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.4)
    return model.eval()


def expected(model: Model) -> str:
    """The greedy answer of the unsplit model."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    drawn = model.generate(**prompt, max_new_tokens=COUNT, do_sample=False)
    said: str = tokenizer.decode(drawn[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


@pytest.fixture
async def http(adapted: Model, tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    adapted.save_pretrained(tmp_path / "pirate")
    hosted = (str(tmp_path / "pirate"),)
    async with Swarm(Path(DEMO_MODEL)) as swarm:
        await swarm.start_one("ann", "0:3", adapters=hosted)
        await swarm.start_one("bob", "3:6", adapters=hosted)
        await swarm.start_one("eve", "0:6")
        timeout = aiohttp.ClientTimeout(120)
        async with (
            Gateway(GatewaySettings(data_dir=tmp_path), swarm.client) as gateway,
            aiohttp.ClientSession(gateway.url, timeout=timeout) as session,
        ):
            yield session


def asked(model: str, **fields: object) -> Json:
    return {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": COUNT, **fields}


async def test_the_adapter_answers_under_its_own_name(
    http: aiohttp.ClientSession, whole: Model, adapted: Model
) -> None:
    async with http.get("/v1/models") as response:
        listed = {model["id"] for model in (await response.json())["data"]}
    assert listed == {BASE, f"{BASE}+pirate"}

    with_it, without = expected(adapted), expected(whole)
    assert with_it != without, "an adapter that changes nothing proves nothing"
    status, answer, _ = await post(http, asked(f"{BASE}+pirate"))
    assert (status, answer["choices"][0]["message"]["content"]) == (200, with_it)
    assert answer["model"] == f"{BASE}+pirate"
    streamed = await chunks(http, asked(f"{BASE}+pirate", stream=True))
    assert content(streamed) == with_it
    _, answer, _ = await post(http, asked(BASE))
    assert answer["choices"][0]["message"]["content"] == without


async def test_an_adapter_that_nobody_hosts_is_told_by_name(http: aiohttp.ClientSession) -> None:
    status, error = await error_of(http, asked(f"{BASE}+parrot"))
    assert (status, error["code"]) == (404, "model_not_found")
    assert f"{BASE}+parrot" in error["message"]
