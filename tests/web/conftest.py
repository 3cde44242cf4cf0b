"""A gateway before a fake swarm, and clients for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest
from tokenizers import Tokenizer

from tests.harness.fake_swarm import FakeSwarm
from tests.harness.tokenizers import byte_level, chat_files
from web.app import Gateway, GatewaySettings


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="session")
def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    return chat_files(tokenizer)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture
async def swarm(tokenizer: Tokenizer, files: dict[str, bytes]) -> FakeSwarm:
    swarm = FakeSwarm(tokenizer, files)
    swarm.serve("petal", ann=(0, 2), bob=(2, 4))
    return swarm


@pytest.fixture
async def gateway(swarm: FakeSwarm, data_dir: Path) -> AsyncIterator[Gateway]:
    settings = GatewaySettings(data_dir=data_dir, keepalive_s=0.05, patience_s=0)
    async with Gateway(settings, swarm) as gateway:
        yield gateway
    assert swarm.running == 0, "an answer outlived the gateway"


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(gateway.url, timeout=aiohttp.ClientTimeout(60)) as session:
        yield session


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client
