"""A swarm with two relays: either may go, hide or lie, and answers stay exact."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from relay.app import Relay
from shared.client.session import Drawn
from shared.protocol import Gone
from tests.harness.swarm import Swarm, tokens

PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]
LONG = 120
"""More tokens than the ring may run ahead, so that what happens early happens in mid-answer."""


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "relay-only"])
@pytest.mark.parametrize("victim", [0, 1])
async def test_a_relay_killed_in_mid_answer_costs_no_token(llama: Path, victim: int, direct: bool) -> None:
    async with Swarm(llama, direct=direct, relay_count=2) as swarm:
        await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
        answer = swarm.ask(PROMPT, new=LONG)
        events = [await anext(answer) for _ in range(7)]

        await swarm.stop_relay(victim)
        events += [event async for event in answer]

        assert tokens(events) == swarm.reference(PROMPT, new=LONG)
        assert all(isinstance(event, Drawn) for event in events)  # nobody was taken for lost
        again = [event async for event in swarm.ask(PROMPT, new=5)]
        assert tokens(again) == tokens(events)[:5]


async def test_a_peer_that_joins_after_a_relay_died_is_found(llama: Path) -> None:
    async with Swarm(llama, relay_count=2) as swarm:
        await swarm.start(ann=(0, 3))
        await swarm.stop_relay(0)
        await swarm.start(bob=(3, 6))
        assert tokens([event async for event in swarm.ask(PROMPT, new=5)]) == swarm.reference(PROMPT, new=5)


async def test_a_relay_that_hides_peers_does_not_hide_them_when_another_shows_them(llama: Path) -> None:
    async with Swarm(llama, relay_count=2, direct=False) as swarm:
        hide_everyone(swarm.relays[0])
        await swarm.start(ann=(0, 3), bob=(3, 6))
        first = [event async for event in swarm.ask(PROMPT, new=5)]

        liar = swarm.relays[0].meeting.participants.get(swarm.client.identity.id)
        assert liar is not None
        for peer in swarm.peers.values():
            liar.send(Gone(peer.identity.id))
        heard = asyncio.Event()
        swarm.client.relays.clients[0].on_gone(lambda _: heard.set())
        liar.send(Gone("0" * 64))
        await asyncio.wait_for(heard.wait(), 5)

        assert {live.name for live in swarm.client.directory.live()} == {"ann", "bob"}
        second = [event async for event in swarm.ask(PROMPT, new=5)]
        assert tokens(first) == tokens(second) == swarm.reference(PROMPT, new=5)


def hide_everyone(relay: Relay) -> None:
    """From now on it takes announcements and shows none."""

    def tell_nobody(*_: object) -> None:
        pass

    relay.meeting.registry.live = lambda *_: []  # type: ignore[method-assign]
    relay.meeting._tell = tell_nobody  # type: ignore[method-assign, assignment]


async def test_peers_need_one_relay_in_common(llama: Path) -> None:
    """Ann is at the first relay only, Eve at the second only; Bob between them is at both."""
    async with Swarm(llama, relay_count=2, direct=False) as swarm:
        await swarm.start_one("ann", "0:2", relays=[0])
        await swarm.start_one("bob", "2:6", relays=[0, 1])
        assert tokens([event async for event in swarm.ask(PROMPT, new=5)]) == swarm.reference(PROMPT, new=5)
        await swarm.stop("ann")
        await swarm.start_one("eve", "0:2", relays=[1])
        assert tokens([event async for event in swarm.ask(PROMPT, new=5)]) == swarm.reference(PROMPT, new=5)


async def test_a_peer_says_where_it_can_be_met(llama: Path) -> None:
    async with Swarm(llama, relay_count=2) as swarm:
        ann = await swarm.start_one("ann", "0:6")
        await ann.announce("serving")
        await swarm.until(lambda: len(swarm.client.directory.live()[0].relays) == 2)
        assert set(swarm.client.directory.live()[0].relays) == set(swarm.relay_urls)

        await swarm.stop_relay(1)
        await ann.announce("serving")
        await swarm.until(lambda: swarm.client.directory.live()[0].relays == [swarm.relay_urls[0]])
