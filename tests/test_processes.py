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
EXTRA = {"bea": "2/3"}
NEW = 160
DEADLINE_S = 60.0


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
                tasks.create_task(swarm.start(name, (LAYERS | EXTRA)[name]))


async def end(swarm: ProcessSwarm, name: str) -> None:
    """Kill a peer, dead or alive, and wait until nobody counts on it."""
    process = swarm.children[name].process
    if process.returncode is None:
        process.kill()
    await process.wait()
    await swarm.until(lambda: name not in swarm.serving())


async def test_three_processes_say_what_the_unsplit_model_says(
    swarm: ProcessSwarm, story: list[int], expected: list[int]
) -> None:
    events = [event async for event in swarm.ask(story, new=NEW)]

    assert tokens(events) == expected
    for drawn in events:
        assert isinstance(drawn, Drawn)
        assert [swarm.name(hop.peer) for hop in drawn.hops] == list(THIRDS)


def strike(swarm: ProcessSwarm, name: str, number: signal.Signals = signal.SIGKILL) -> str:
    os.kill(swarm.children[name].process.pid, number)
    return name


async def answer_with(
    swarm: ProcessSwarm, prompt: list[int], places: dict[int, int], number: signal.Signals = signal.SIGKILL
) -> tuple[list[Drawn | Rerouted], list[str]]:
    """An answer in which hops get a signal, by the count of tokens after which they do; and who got it."""
    events: list[Drawn | Rerouted] = []
    victims: list[str] = []
    async with asyncio.timeout(DEADLINE_S), aclosing(swarm.ask(prompt, new=NEW)) as answer:
        async for event in answer:
            events.append(event)
            if isinstance(event, Drawn) and (hop := places.get(len(tokens(events)))) is not None:
                victims.append(strike(swarm, swarm.name(event.hops[hop].peer), number))
    return events, victims


async def bury(swarm: ProcessSwarm, victims: list[str]) -> None:
    for name in victims:
        await end(swarm, name)


def places(seed: int, kills: int) -> dict[int, int]:
    """Tokens at which hops die, each of another third. The same when a failure is looked into."""
    chance = random.Random(seed)
    at = sorted(chance.sample(range(2, NEW - 20), kills))
    return dict(zip(at, chance.sample(range(3), kills), strict=True))


@pytest.mark.parametrize("seed", range(4))
async def test_three_peers_that_are_killed_while_tokens_are_drawn_cost_not_one_wrong_token(
    swarm: ProcessSwarm, story: list[int], expected: list[int], seed: int
) -> None:
    await start(swarm, *LAYERS)

    events, victims = await answer_with(swarm, story, places(seed, 3))

    assert tokens(events) == expected
    assert len(victims) == 3
    assert any(isinstance(event, Rerouted) for event in events)
    await bury(swarm, victims)


@pytest.mark.parametrize("standbys", [True, False])
async def test_a_peer_that_is_killed_while_it_takes_over_costs_not_one_wrong_token(
    swarm: ProcessSwarm, story: list[int], expected: list[int], standbys: bool
) -> None:
    await start(swarm, *LAYERS, "bea")
    swarm.client.standbys = standbys
    events: list[Drawn | Rerouted] = []
    victims: list[str] = []

    async with asyncio.timeout(DEADLINE_S), aclosing(swarm.ask(story, new=NEW)) as answer:
        async for event in answer:
            events.append(event)
            if isinstance(event, Drawn) and len(tokens(events)) == 40 and not victims:
                victims.append(strike(swarm, swarm.name(event.hops[1].peer)))
            elif isinstance(event, Rerouted) and len(victims) == 1:
                heir = next(swarm.name(span.peer) for span in event.route if span.start == 2)
                if heir not in victims:
                    victims.append(strike(swarm, heir))

    swarm.client.standbys = True
    assert tokens(events) == expected
    assert len(victims) == 2
    await bury(swarm, victims)


@pytest.mark.parametrize(("hop", "after_ms"), [(1, 5), (2, 30), (0, 60), (1, 100)])
async def test_a_peer_that_is_killed_during_the_prompt_costs_not_one_wrong_token(
    swarm: ProcessSwarm, story: list[int], hop: int, after_ms: int
) -> None:
    await start(swarm, *LAYERS)
    prompt = (story * 100)[:1200]
    victims: list[str] = []

    def reserved() -> None:
        victim = swarm.route()[hop]
        asyncio.get_running_loop().call_later(after_ms / 1000, lambda: victims.append(strike(swarm, victim)))

    async with asyncio.timeout(DEADLINE_S), aclosing(swarm.ask(prompt, new=30, reserved=reserved)) as answer:
        events = [event async for event in answer]

    assert tokens(events) == reference(MODEL, prompt, 30)
    assert victims
    await bury(swarm, victims)


@pytest.mark.parametrize("places", [{20: 1}, {12: 0, 60: 2}])
async def test_frozen_peers_cost_not_one_wrong_token(
    swarm: ProcessSwarm, story: list[int], expected: list[int], places: dict[int, int]
) -> None:
    await start(swarm, *LAYERS)

    events, victims = await answer_with(swarm, story, places, signal.SIGSTOP)

    assert tokens(events) == expected
    assert any(isinstance(event, Rerouted) for event in events)
    await bury(swarm, victims)


async def test_without_a_replacement_one_sentence_says_which_layers_are_missing(
    swarm: ProcessSwarm, story: list[int], expected: list[int]
) -> None:
    await start(swarm, *THIRDS)
    for name in {"ben", "bea"} & swarm.serving():
        await end(swarm, name)
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
