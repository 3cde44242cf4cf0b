"""Tokens per second of several sessions together, through one span.

The sessions go through the batcher and its thread as those of a peer do; there is no network. The numbers of
sessions take turns, round after round, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Sequence
from statistics import median

from bench.one_process import prompt
from peer.model.kv_cache import KVCache
from peer.model.span import Span
from peer.serving.batcher import Batcher
from peer.serving.compute import Draw
from peer.serving.executor import Executor
from shared.background import Background
from shared.protocol import Sampling, Step, Tensor

WARM_UP = 8
"""Tokens of each session before it counts: a span learns its steps from the first few."""
GREEDY = Draw(Sampling(), [], 0)


class Chat:
    """A session that draws one token after another, or feeds zeros where the span draws none."""

    def __init__(self, number: int, batcher: Batcher, cache: KVCache) -> None:
        self._session = f"{number:032x}"
        self._batcher = batcher
        self._cache = cache
        self._token = 0

    async def feed(self, tokens: Sequence[int]) -> None:
        step = Step(
            session=self._session,
            epoch=0,
            position=self._cache.length,
            count=len(tokens),
            tensor=Tensor("int32", [len(tokens)]),
        )
        computed = await self._batcher.compute(self._cache, step, array("i", tokens).tobytes(), GREEDY)
        self._token = computed.token or 0

    async def draw(self, count: int) -> None:
        for _ in range(count):
            await self.feed([self._token])


async def rates(
    span: Span, widths: Sequence[int], context: int, tokens: int, rounds: int
) -> dict[int, float]:
    """Tokens per second of all sessions together, for so many sessions at a time: the median of the rounds.

    The span begins at layer 0. Every session begins behind the same `context` positions.
    """
    capacity = context + WARM_UP + tokens * rounds
    found: dict[int, list[float]] = {width: [] for width in widths}
    async with Executor() as executor, Background() as tasks:
        batcher = Batcher(span, executor)
        tasks.start(batcher.run())
        begun = span.new_cache(span.start, span.end, capacity)
        await Chat(0, batcher, begun).feed(prompt(context, span.vocab_size))
        groups = {
            width: [Chat(number, batcher, begun.copy(context, capacity)) for number in range(width)]
            for width in widths
        }
        for chats in groups.values():
            await asyncio.gather(*(chat.draw(WARM_UP) for chat in chats))
        for _ in range(rounds):
            for width, chats in groups.items():
                began = time.perf_counter()
                await asyncio.gather(*(chat.draw(tokens) for chat in chats))
                found[width].append(width * tokens / (time.perf_counter() - began))
    return {width: median(each) for width, each in found.items()}
