"""Little room and many who want it: the whole route or nothing, the true queue, and when to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from shared.client.session import Drawn, Request, Rerouted
from shared.client.swarm_client import SwarmClient
from shared.errors import Busy, NoRoom
from shared.identity import Identity
from tests.harness.swarm import Swarm, tokens, until

PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]
LITTLE = 100_000
"""Bytes for some dozens of positions at a peer with all layers."""


@pytest.fixture
async def small(llama: Path) -> AsyncIterator[Swarm]:
    """Peers with little memory."""
    async with Swarm(llama, kv_bytes=LITTLE) as swarm:
        yield swarm


def room(swarm: Swarm, name: str) -> int:
    """Positions that fit at a peer now."""
    service = swarm.peers[name].service
    assert service is not None
    return service.kv_tokens_free


async def emptied(swarm: Swarm, *names: str) -> None:
    async with asyncio.timeout(5):
        for name in names:
            service = swarm.peers[name].service
            assert service is not None
            await service.drained()


async def begun(answer: AsyncGenerator[Drawn | Rerouted, None]) -> list[str]:
    """The peers of an answer's first token."""
    first = await anext(answer)
    assert isinstance(first, Drawn)
    return [hop.peer for hop in first.hops]


# ---------------------------------------------------------------- the whole route or nothing


async def test_when_one_hop_has_no_room_the_others_are_free_at_once(small: Swarm) -> None:
    await small.start(ann=(0, 1), bob=(1, 6))
    assert room(small, "ann") > 2 * room(small, "bob")
    other = SwarmClient(Identity.generate(), small.relay_urls)
    async with other:
        await until(other.directory, lambda: len(other.directory.serving(small.artefact)) == 2, 5)
        taken = small.ask(PROMPT, new=room(small, "bob") - len(PROMPT))
        await anext(taken)
        # To this asker bob is roomy still: it was announced so.
        request = Request(artefact=small.artefact, prompt=PROMPT, max_new_tokens=10)
        with pytest.raises(Busy):
            await anext(other.generate(request))
        await taken.aclose()
        # Far sooner than a lease of 30 s would end it.
        await emptied(small, "ann", "bob")
        assert small.reserved_bytes() == {"ann": 0, "bob": 0}


async def test_a_full_swarm_says_when_to_come_back(small: Swarm) -> None:
    await small.start(ann=(0, 6))
    taken = small.ask(PROMPT, new=room(small, "ann") - len(PROMPT))
    await anext(taken)
    with pytest.raises(Busy, match=r"full; try again in \d+ s") as refusal:
        await anext(small.ask(PROMPT, new=5))
    assert 0 < refusal.value.retry_after_s <= 30
    await taken.aclose()


async def test_room_that_was_given_back_is_found_before_it_is_announced(small: Swarm) -> None:
    await small.start(ann=(0, 6))
    ann, new = small.peers["ann"], room(small, "ann") - len(PROMPT)
    taken = small.ask(PROMPT, new=new)
    await anext(taken)
    await ann.announce("serving")
    await small.until(lambda: small.client.directory.live()[0].kv_tokens_free == 0)
    await taken.aclose()
    await emptied(small, "ann")

    answer = [event async for event in small.ask(PROMPT, new=5)]

    assert small.client.directory.live()[0].kv_tokens_free == 0
    assert tokens(answer) == small.reference(PROMPT, new=5)


async def test_a_session_longer_than_any_peer_can_hold_is_told_so(small: Swarm) -> None:
    await small.start(ann=(0, 6))
    with pytest.raises(NoRoom, match="shorten it, or ask for a shorter answer"):
        await anext(small.ask(PROMPT, new=room(small, "ann")))


# ---------------------------------------------------------------- the truth about the queue


async def test_the_queue_of_this_moment_decides_and_not_an_old_announcement(swarm: Swarm) -> None:
    await swarm.start(bob=(0, 6))
    many = [swarm.ask(PROMPT, new=200) for _ in range(10)]
    for answer in many:
        await begun(answer)
    await swarm.start(ann=(0, 6))
    alone = swarm.ask(PROMPT, new=200)
    assert await begun(alone) == [swarm.peers["ann"].identity.id], "an asker knows where its sessions are"
    await swarm.peers["ann"].announce("serving")
    await swarm.until(lambda: {live.sessions for live in swarm.client.directory.live()} == {0, 1})
    await alone.aclose()
    await emptied(swarm, "ann")

    # To anyone else it looks as if ann was busy and bob was not.
    async with SwarmClient(Identity.generate(), swarm.relay_urls) as other:
        await until(other.directory, lambda: len(other.directory.serving(swarm.artefact)) == 2, 5)
        request = Request(artefact=swarm.artefact, prompt=PROMPT, max_new_tokens=5)
        async with aclosing(other.generate(request)) as answer:
            assert await begun(answer) == [swarm.peers["ann"].identity.id]
    for answer in many:
        await answer.aclose()
