"""A swarm whose peers stand by for each other: an answer goes on where it was, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from shared.client.session import Drawn, Rerouted
from shared.protocol import Sampling
from tests.harness.swarm import Swarm, tokens

PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]
NEW = 300
"""Enough to go on while standbys are found, brought up and needed."""
Events = list[Drawn | Rerouted]
Answer = AsyncGenerator[Drawn | Rerouted, None]


async def read_until(answer: Answer, events: Events, condition: Callable[[], bool]) -> None:
    """Take tokens until something is so."""
    while not condition():
        events.append(await anext(answer))


def computed(swarm: Swarm, name: str) -> int:
    """Positions that a peer has computed."""
    service = swarm.peers[name].service
    assert service is not None
    return service.batcher.positions


def rerouted(events: Events) -> list[Rerouted]:
    return [event for event in events if isinstance(event, Rerouted)]


async def emptied(swarm: Swarm) -> None:
    """Closes travel behind the last token: wait until no peer holds anything for anyone."""
    async with asyncio.timeout(5):
        for peer in swarm.peers.values():
            assert peer.service is not None
            await peer.service.drained()
            assert peer.service.session_count == peer.service.standby_count == 0
    assert not any(swarm.reserved_bytes().values())


@pytest.mark.parametrize("victim", ["ann", "bob", "eve"])
async def test_who_stands_by_takes_over_without_a_replay(swarm: Swarm, victim: str) -> None:
    layers = {"ann": (0, 2), "bob": (2, 4), "eve": (4, 6)}
    await swarm.start(**layers)
    answer = swarm.ask(PROMPT, new=NEW)
    events: Events = [await anext(answer)]
    await swarm.start(zoe=layers[victim])
    await read_until(answer, events, lambda: computed(swarm, "zoe") > len(PROMPT) + 20)
    followed = computed(swarm, "zoe")

    await swarm.stop(victim)
    await read_until(answer, events, lambda: bool(rerouted(events)))
    known = len(PROMPT) + len(tokens(events))
    await read_until(answer, events, lambda: isinstance(events[-1], Drawn))
    caught_up = computed(swarm, "zoe") - followed
    events += [event async for event in answer]

    [event] = rerouted(events)
    assert (swarm.client.directory.name(event.lost), event.reason, event.stood_by) == (victim, "lost", True)
    assert [swarm.name(span.peer) for span in event.route].count("zoe") == 1
    assert tokens(events) == swarm.reference(PROMPT, new=NEW)
    assert caught_up < known - len(PROMPT) + 20, "it began where it had followed to"
    await emptied(swarm)


async def test_a_spare_for_every_layer_stands_by_for_one_hop_and_the_next_for_another(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    answer = swarm.ask(PROMPT, new=NEW)
    events: Events = [await anext(answer)]
    await swarm.start(carl=(0, 6), dora=(0, 6))
    await read_until(answer, events, lambda: len(swarm.standbys()) == 2)
    assert set(swarm.standbys().values()) == {(0, 3), (3, 6)}
    await answer.aclose()
    await emptied(swarm)


@pytest.mark.parametrize("victims", [("bob", "eve"), ("bob", "zoe"), ("zoe", "bob")])
async def test_two_losses_at_once_are_survived(swarm: Swarm, victims: tuple[str, str]) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    answer = swarm.ask(PROMPT, new=NEW)
    events: Events = [await anext(answer)]
    await swarm.start(zoe=(2, 4), yves=(4, 6))
    await read_until(answer, events, lambda: {*swarm.standbys()} == {"zoe", "yves"})
    await swarm.start(rob=(2, 4))

    async with asyncio.TaskGroup() as tasks:
        for victim in victims:
            tasks.create_task(swarm.stop(victim))
    events += [event async for event in answer]

    assert tokens(events) == swarm.reference(PROMPT, new=NEW)
    assert rerouted(events)
    await emptied(swarm)


async def test_a_standby_that_goes_is_replaced_and_nobody_is_told(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    answer = swarm.ask(PROMPT, new=NEW)
    events: Events = [await anext(answer)]
    await swarm.start(zoe=(3, 6))
    await read_until(answer, events, lambda: "zoe" in swarm.standbys())
    await swarm.start(yves=(3, 6))
    await swarm.stop("zoe")
    await read_until(answer, events, lambda: "yves" in swarm.standbys())
    assert rerouted(events) == []

    await swarm.stop("bob")
    events += [event async for event in answer]

    assert [event.stood_by for event in rerouted(events)] == [True]
    assert tokens(events) == swarm.reference(PROMPT, new=NEW)
    await emptied(swarm)


async def test_standbys_survive_a_change_elsewhere_on_the_route(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    answer = swarm.ask(PROMPT, new=NEW)
    events: Events = [await anext(answer)]
    await swarm.start(zoe=(2, 4), yves=(4, 6), alba=(0, 2))
    await read_until(answer, events, lambda: {*swarm.standbys()} == {"zoe", "yves", "alba"})
    for victim in ("ann", "eve", "bob"):
        before = len(events)
        await swarm.stop(victim)
        await read_until(answer, events, lambda: bool(rerouted(events[before:])))  # noqa: B023
        await read_until(answer, events, lambda: len(events) > before + 40)  # noqa: B023
    events += [event async for event in answer]

    assert [event.stood_by for event in rerouted(events)] == [True] * 3
    assert tokens(events) == swarm.reference(PROMPT, new=NEW)
    await emptied(swarm)


async def test_a_session_takes_the_memory_that_a_standby_holds(llama: Path) -> None:
    async with Swarm(llama, kv_bytes=250_000) as swarm:
        await swarm.start(ann=(0, 6))
        answer = swarm.ask(PROMPT, new=100)
        events: Events = [await anext(answer)]
        await swarm.start(zoe=(0, 6))
        await read_until(answer, events, lambda: "zoe" in swarm.standbys())
        zoe = swarm.peers["zoe"].service
        assert zoe is not None
        assert zoe.standby_count == 1
        room = zoe.kv_tokens_free
        assert room * 2 > zoe._budget.total_bytes // zoe._bytes_per_token(0, 6), (
            "a standby's room counts as free"
        )

        await swarm.stop("ann")
        events += [event async for event in answer]
        assert rerouted(events)[0].stood_by
        assert tokens(events) == swarm.reference(PROMPT, new=100)
        await emptied(swarm)


async def test_with_penalties_the_draws_stay_the_same(swarm: Swarm) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=7, repetition_penalty=1.2, frequency_penalty=0.3)
    await swarm.start(ann=(0, 3), bob=(3, 6))
    expected = tokens([event async for event in swarm.ask(PROMPT, new=150, sampling=sampling)])
    answer = swarm.ask(PROMPT, new=150, sampling=sampling)
    events: Events = [await anext(answer)]
    await swarm.start(zoe=(3, 6), alba=(0, 3))
    await read_until(answer, events, lambda: {*swarm.standbys()} == {"zoe", "alba"})

    await swarm.stop("bob")
    await read_until(answer, events, lambda: bool(rerouted(events)))
    await swarm.stop("ann")
    events += [event async for event in answer]

    assert tokens(events) == expected
    assert len(rerouted(events)) == 2
    await emptied(swarm)


async def test_the_next_question_begins_behind_what_the_standby_had_kept(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    prompt = [*PROMPT] * 12
    answer = swarm.ask(prompt, new=NEW)
    events: Events = [await anext(answer)]
    await swarm.start(zoe=(3, 6))
    await read_until(answer, events, lambda: computed(swarm, "zoe") > len(prompt) + 20)
    await swarm.stop("bob")
    events += [event async for event in answer]
    await emptied(swarm)
    before = computed(swarm, "zoe")

    longer = [*prompt, *tokens(events), 5, 6, 7]
    again = tokens([event async for event in swarm.ask(longer, new=5)])

    assert again == swarm.reference(longer, new=5)
    assert computed(swarm, "zoe") - before < 64 + 3 + 5


async def test_a_peer_that_leaves_on_purpose_hands_over_and_may_go_at_once(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    answer = swarm.ask(PROMPT, new=NEW)
    events: Events = [await anext(answer)]
    await swarm.start(zoe=(2, 4))

    leaving = asyncio.create_task(swarm.peers["bob"].drain(timeout_s=30))
    events += [event async for event in answer]

    assert await leaving, "its session was over before its time was up"
    [event] = rerouted(events)
    assert (event.reason, event.stood_by) == ("leaving", True)
    assert [swarm.name(span.peer) for span in event.route] == ["ann", "zoe", "eve"]
    assert tokens(events) == swarm.reference(PROMPT, new=NEW)
    await emptied(swarm)


@pytest.mark.parametrize("hop", [0, 1])
async def test_a_channel_of_the_asker_that_breaks_costs_no_hop_what_it_holds(swarm: Swarm, hop: int) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    prompt = [*PROMPT] * 20
    answer = swarm.ask(prompt, new=100)
    events: Events = [await anext(answer) for _ in range(10)]
    before = {name: computed(swarm, name) for name in swarm.peers}

    peer = swarm.peers[("ann", "bob")[hop]]
    await peer.dialer.channels[swarm.client.identity.id].close("no reason")
    events += [event async for event in answer]

    assert tokens(events) == swarm.reference(prompt, new=100)
    assert all(computed(swarm, name) - before[name] < 100 for name in swarm.peers), "nothing was replayed"
    assert [swarm.name(span.peer) for event in rerouted(events) for span in event.route] == ["ann", "bob"]
    await emptied(swarm)


async def test_a_channel_between_two_hops_that_breaks_costs_neither_what_it_holds(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    prompt = [*PROMPT] * 20
    answer = swarm.ask(prompt, new=100)
    events: Events = [await anext(answer) for _ in range(10)]
    before = {name: computed(swarm, name) for name in swarm.peers}

    ann, bob = swarm.peers["ann"], swarm.peers["bob"]
    await ann.dialer.channels[bob.identity.id].close("no reason")
    events += [event async for event in answer]

    assert tokens(events) == swarm.reference(prompt, new=100)
    assert all(computed(swarm, name) - before[name] < 100 for name in swarm.peers), "nothing was replayed"
    await emptied(swarm)
