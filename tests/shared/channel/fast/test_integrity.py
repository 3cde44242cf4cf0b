"""What is sent arrives whole, once and in order, whatever the path does to datagrams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from shared.channel.webrtc import PLAIN, Transports, best_transports
from tests.harness.direct_links import frames_in, linked, random_frames
from tests.harness.lossy_path import (
    Fate,
    LossyPath,
    at_random,
    every_lost,
    every_overtaken,
    every_repeated,
    sacks_lost,
    tails_lost,
)

FAST = best_transports()
FATES: dict[str, Callable[[], Fate]] = {
    "every 50th lost": lambda: every_lost(50),
    "every 7th lost": lambda: every_lost(7),
    "bursts of 12 in 200 lost": lambda: every_lost(200, 12),
    "tails lost": tails_lost,
    "two of three SACKs lost": lambda: sacks_lost(3),
    "every 5th repeated": lambda: every_repeated(5),
    "every 10th overtaken by 2": lambda: every_overtaken(10, 2),
    "every 30th overtaken by 40": lambda: every_overtaken(30, 40),
    "4 % lost at random": lambda: at_random(0.04, seed=1),
}


async def both_ways(
    total_bytes: int, path: LossyPath, one: Transports = FAST, other: Transports = FAST
) -> None:
    async with path, linked(one, other, path=path) as (ann, bob):
        ann.keep = bob.keep = False
        sent_by_ann, sent_by_bob = await asyncio.gather(
            ann.send_all(random_frames(total_bytes, seed=1)), bob.send_all(random_frames(total_bytes, seed=2))
        )
        await asyncio.gather(ann.got(frames_in(total_bytes, seed=2)), bob.got(frames_in(total_bytes, seed=1)))

        assert (ann.digest, bob.digest) == (sent_by_bob, sent_by_ann)
        assert path.harmed > 0


@pytest.mark.parametrize("fate", FATES.values(), ids=FATES.keys())
async def test_a_megabyte_each_way_survives(fate: Callable[[], Fate]) -> None:
    await both_ways(1 << 20, LossyPath(fate(), fate()))


@pytest.mark.parametrize("fate", FATES.values(), ids=FATES.keys())
async def test_stock_aiortc_understands_how_we_repair_losses(fate: Callable[[], Fate]) -> None:
    path = LossyPath(fate(), every_lost(100))
    async with path, linked(FAST, PLAIN, path=path) as (ann, bob):
        sent = await ann.send_all(random_frames(300_000, seed=3))
        await bob.got(frames_in(300_000, seed=3))

        assert bob.digest == sent


@pytest.mark.slow
@pytest.mark.parametrize("fate", FATES.values(), ids=FATES.keys())
async def test_64_mib_each_way_survive(fate: Callable[[], Fate]) -> None:
    await both_ways(64 << 20, LossyPath(fate(), fate()))
