"""A tokenizer is fetched once, and found again on disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shared.errors import NoRoute, ProtocolError
from tests.harness.fake_swarm import FakeSwarm, artefact_of
from web.tokenizer_cache import KEPT, TokenizerCache

PETAL = artefact_of("petal")


def kept_files(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(pattern))


async def test_many_askers_wait_for_one_fetch(swarm: FakeSwarm, tmp_path: Path) -> None:
    cache = TokenizerCache(swarm, tmp_path)
    tokenizers = await asyncio.gather(*(cache.get(PETAL) for _ in range(5)))
    assert swarm.fetches == 1
    assert len(set(map(id, tokenizers))) == 1


async def test_the_next_start_finds_it_on_disk(swarm: FakeSwarm, tmp_path: Path) -> None:
    await TokenizerCache(swarm, tmp_path).get(PETAL)
    tokenizer = await TokenizerCache(swarm, tmp_path).get(PETAL)
    assert swarm.fetches == 1
    assert tokenizer.decode(tokenizer.encode("petal")) == "petal"


async def test_a_file_that_was_changed_on_disk_is_fetched_anew(swarm: FakeSwarm, tmp_path: Path) -> None:
    await TokenizerCache(swarm, tmp_path).get(PETAL)
    (kept,) = kept_files(tmp_path, "*/tokenizer.json")
    kept.write_text("{}")
    await TokenizerCache(swarm, tmp_path).get(PETAL)
    await TokenizerCache(swarm, tmp_path).get(PETAL)
    assert swarm.fetches == 2


async def test_what_is_unusable_is_not_kept(swarm: FakeSwarm, tmp_path: Path) -> None:
    cache = TokenizerCache(swarm, tmp_path)
    good, swarm.files = swarm.files, {"tokenizer.json": b"{"}
    with pytest.raises(ProtocolError):
        await cache.get(PETAL)
    assert not kept_files(tmp_path, "*")
    swarm.files = good
    await cache.get(PETAL)


async def test_a_file_cannot_be_named_like_a_folder(swarm: FakeSwarm, tmp_path: Path) -> None:
    swarm.files = {**swarm.files, "..": b"x"}
    with pytest.raises(ProtocolError):
        await TokenizerCache(swarm, tmp_path).get(PETAL)


async def test_a_model_that_nobody_serves_has_no_tokenizer(swarm: FakeSwarm, tmp_path: Path) -> None:
    with pytest.raises(NoRoute):
        await TokenizerCache(swarm, tmp_path).get(artefact_of("other"))


async def test_memory_keeps_only_the_last_ones(swarm: FakeSwarm, tmp_path: Path) -> None:
    cache = TokenizerCache(swarm, tmp_path)
    first = await cache.get(PETAL)
    for number in range(KEPT):
        await cache.get(swarm.serve(f"other-{number}", ann=(0, 2), bob=(2, 4)))
        swarm.serve("petal", eve=(0, 2))
    assert await cache.get(PETAL) is not first
