"""Thirty-two chats on one swarm whose peers go away and come back: each is exact, or ends with a sentence."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.client.session import Drawn, Rerouted
from shared.errors import Busy, NoRoute, SessionFailed
from tests.harness.models import VOCABULARY, save_random
from tests.harness.near_ties import equal_but_for_near_ties
from tests.harness.swarm import Swarm, tokens

pytestmark = pytest.mark.slow

CHATS = 32
NEW = 48
DEADLINE_S = 90.0
SPANS = {"ann": (0, 2), "ada": (0, 2), "bob": (2, 4), "ben": (2, 4), "eve": (4, 6), "eli": (4, 6)}
# One of each pair at a time: a swarm that has lost a layer for good has nothing to be exact with.
KILLS = 6


class Progress:
    """How many tokens all chats have got, for those who wait for a moment in the middle."""

    def __init__(self) -> None:
        self.drawn = 0
        self._moved = asyncio.Event()

    def tick(self) -> None:
        self.drawn += 1
        self._moved.set()

    async def reached(self, count: int) -> None:
        while self.drawn < count:
            self._moved.clear()
            await self._moved.wait()


class Chat:
    """One question and what came of it."""

    def __init__(self, number: int) -> None:
        numbers = random.Random(number)
        self.prompt = [numbers.randrange(VOCABULARY) for _ in range(numbers.randrange(3, 80))]
        self.events: list[Drawn | Rerouted] = []
        self.error: Exception | None = None

    async def run(self, swarm: Swarm, progress: Progress) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S), aclosing(swarm.ask(self.prompt, new=NEW)) as answer:
                async for event in answer:
                    self.events.append(event)
                    if isinstance(event, Drawn):
                        progress.tick()
        except (NoRoute, Busy, SessionFailed) as error:
            self.error = error


async def kill_some(swarm: Swarm, progress: Progress) -> None:
    """At random moments a random peer goes away, and another one comes for the same layers."""
    numbers = random.Random(7)
    for kill in range(1, KILLS + 1):
        await progress.reached(kill * CHATS * NEW // (KILLS + 2))
        name = numbers.choice(sorted(swarm.peers))
        start, end = SPANS[name.rstrip("+")]
        await swarm.stop(name)
        await swarm.start_one(f"{name}+", f"{start}:{end}")


async def test_32_chats_with_random_kills_end_exact_or_with_a_sentence(tmp_path: Path) -> None:
    model = save_random("llama", tmp_path)
    before = asyncio.all_tasks()
    chats = [Chat(number) for number in range(CHATS)]
    async with Swarm(model) as swarm:
        await swarm.start(**SPANS)
        progress = Progress()
        async with asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(kill_some(swarm, progress))
            for chat in chats:
                tasks.create_task(chat.run(swarm, progress))
        assert killing.done()
        async with asyncio.timeout(10):
            for peer in swarm.peers.values():
                assert peer.service is not None
                await peer.service.drained()
        assert set(swarm.reserved_bytes().values()) == {0}
    assert not asyncio.all_tasks() - before

    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.eval()
    for chat in chats:
        said = tokens(chat.events)
        assert equal_but_for_near_ties(chat.prompt, said, whole)
        assert len(said) == NEW or (chat.error is not None and str(chat.error))
    complete = sum(chat.error is None for chat in chats)
    assert complete >= CHATS // 2
    assert sum(isinstance(event, Rerouted) for chat in chats for event in chat.events) >= KILLS
