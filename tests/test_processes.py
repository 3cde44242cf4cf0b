"""The main job as people run it: relay and peers are processes of their own; killing one costs no token."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoTokenizer

from peer.settings import DEMO_MODEL
from shared.client.session import Drawn, Rerouted
from shared.errors import NoRoute
from tests.harness.processes import ProcessSwarm
from tests.harness.swarm import reference, tokens

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

MODEL = Path(DEMO_MODEL)
THIRDS = {"ann": "1/3", "bob": "2/3", "eve": "3/3"}
SPARES = {"ada": "1/3", "ben": "2/3", "eli": "3/3"}
LAYERS = THIRDS | SPARES
NEW = 160
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def story() -> list[int]:
    """The prompt whose answer is the demo model's longest."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    question = [{"role": "user", "content": "Tell me a story"}]
    return list(tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"])


@pytest.fixture(scope="module")
def expected(story: list[int]) -> list[int]:
    return reference(MODEL, story, NEW)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessSwarm]:
    """Three peers, each with a third of the demo model."""
    async with ProcessSwarm(MODEL, tmp_path_factory.mktemp("swarm")) as swarm:
        await start(swarm, *THIRDS)
        yield swarm


async def start(swarm: ProcessSwarm, *names: str) -> None:
    """Those of the peers that do not run yet, all at once."""
    async with asyncio.TaskGroup() as tasks:
        for name in names:
            if name not in swarm.serving():
                tasks.create_task(swarm.start(name, LAYERS[name]))


async def end(swarm: ProcessSwarm, name: str) -> None:
    """Kill a peer, dead or alive, and wait until nobody counts on it."""
    process = swarm.children[name].process
    if process.returncode is None:
        process.kill()
    await process.wait()
    await swarm.until(lambda: name not in swarm.serving())


async def answer_with(
    swarm: ProcessSwarm, prompt: list[int], at: int, hop: int, number: signal.Signals
) -> list[Drawn | Rerouted]:
    """An answer of NEW tokens; after `at` of them the peer that made the last one at `hop` gets a signal."""
    events: list[Drawn | Rerouted] = []
    victim = ""
    async with asyncio.timeout(DEADLINE_S), aclosing(swarm.ask(prompt, new=NEW)) as answer:
        async for event in answer:
            events.append(event)
            if isinstance(event, Drawn) and len(tokens(events)) == at:
                victim = swarm.name(event.hops[hop].peer)
                os.kill(swarm.children[victim].process.pid, number)
    await end(swarm, victim)
    return events


async def test_three_processes_say_what_the_unsplit_model_says(
    swarm: ProcessSwarm, story: list[int], expected: list[int]
) -> None:
    events = [event async for event in swarm.ask(story, new=NEW)]

    assert tokens(events) == expected
    for drawn in events:
        assert isinstance(drawn, Drawn)
        assert [swarm.name(hop.peer) for hop in drawn.hops] == list(THIRDS)


# A fixed seed: places that differ from each other, and are the same when a failure is looked into.
@pytest.mark.parametrize(
    ("at", "hop"), [(random.Random(seed).randrange(1, NEW - 80), seed % 3) for seed in range(5)]
)
async def test_a_killed_peer_costs_not_one_wrong_token(
    swarm: ProcessSwarm, story: list[int], expected: list[int], at: int, hop: int
) -> None:
    await start(swarm, *LAYERS)

    events = await answer_with(swarm, story, at, hop, signal.SIGKILL)

    assert tokens(events) == expected
    assert any(isinstance(event, Rerouted) for event in events)


async def test_a_frozen_peer_costs_not_one_wrong_token(
    swarm: ProcessSwarm, story: list[int], expected: list[int]
) -> None:
    await start(swarm, *LAYERS)

    events = await answer_with(swarm, story, 20, 1, signal.SIGSTOP)

    assert tokens(events) == expected
    assert any(isinstance(event, Rerouted) for event in events)


async def test_without_a_replacement_one_sentence_says_which_layers_are_missing(
    swarm: ProcessSwarm, story: list[int], expected: list[int]
) -> None:
    await start(swarm, *THIRDS)
    if "ben" in swarm.serving():
        await end(swarm, "ben")
    events: list[Drawn | Rerouted] = []

    with pytest.raises(NoRoute, match=r"no live peer serves layers 2–4 of "):
        async with asyncio.timeout(DEADLINE_S), aclosing(swarm.ask(story, new=NEW)) as answer:
            async for event in answer:
                events.append(event)
                if len(events) == 10:
                    swarm.children["bob"].process.kill()

    said = tokens(events)
    assert said == expected[: len(said)]
    assert len(said) >= 10
