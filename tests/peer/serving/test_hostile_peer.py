"""Whatever a participant with a real channel says, honest answers through the same peers stay exact."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer.lifecycle import Peer
from shared.channel import Channel, Dialer
from shared.client.session import Drawn
from shared.errors import ConnectionLost
from shared.identity import Identity
from shared.protocol import Close, Failed, Hop, Open, Opened, PeerMessage, RouteSpan, Sampling, Step, Tensor
from shared.relay_client import RelayClient
from tests.harness.swarm import Swarm, tokens
from tests.peer.serving.parties import LAYERS, PROMPT, SOON_S, expected_tokens, ids_body, model_directory
from tests.peer.serving.wild import wild_messages

LONG = 100
"""More tokens than the ring may run ahead of who asks."""
SESSIONS = ["1" * 32, "2" * 32]


class Mallory:
    """A participant like any other, with its own key, that speaks as it likes."""

    def __init__(self, identity: Identity, dialer: Dialer, heard: asyncio.Queue[PeerMessage]) -> None:
        self.identity = identity
        self.heard = heard
        self._dialer = dialer

    async def say(self, peer: Peer, message: PeerMessage, body: bytes = b"") -> Channel:
        """Over a new channel, when the peer has closed the last one."""
        for _ in range(3):
            channel = await self._dialer.channel(peer.identity.id)
            try:
                await asyncio.wait_for(channel.send(message, body), SOON_S)
            except ConnectionLost:
                continue
            return channel
        raise AssertionError("the peer hangs up before it was told anything")


@asynccontextmanager
async def mallory(swarm: Swarm) -> AsyncIterator[Mallory]:
    heard: asyncio.Queue[PeerMessage] = asyncio.Queue()

    async def handle(_: Channel, message: PeerMessage, *__: object) -> None:
        heard.put_nowait(message)

    identity = Identity.generate()
    async with (
        RelayClient(swarm.relay.url, identity) as relay,
        Dialer(identity, relay, handle, direct=False) as dialer,
    ):
        yield Mallory(identity, dialer, heard)


@asynccontextmanager
async def two_peers() -> AsyncIterator[tuple[Swarm, Peer, Peer]]:
    async with Swarm(model_directory(), direct=False) as swarm:
        await swarm.start(ann=(0, 3), bob=(3, LAYERS))
        yield swarm, swarm.peers["ann"], swarm.peers["bob"]


async def emptied(*peers: Peer) -> None:
    for peer in peers:
        assert peer.service is not None
        await asyncio.wait_for(peer.service.drained(), SOON_S)
        assert peer.kv_budget.reserved_bytes == 0


def exact(events: list[object]) -> None:
    """The whole answer came, along the route that it began with."""
    drawn = [event for event in events if isinstance(event, Drawn)]
    assert len(drawn) == len(events), events
    assert tokens(drawn) == expected_tokens(tuple(PROMPT), LONG)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_messages_over_a_real_channel(data: st.DataObject) -> None:
    async def scene() -> None:
        async with two_peers() as (swarm, ann, bob), mallory(swarm) as wicked:
            answer = swarm.ask(PROMPT, new=LONG)
            events: list[object] = [await anext(answer)]
            assert ann.service is not None
            # As if it had seen the session's name, which only the hops of its route know.
            sessions = [*SESSIONS, *ann.service._admitted]

            for peer, other in ((ann, bob), (bob, ann)):
                ids = [peer.identity.id, other.identity.id, wicked.identity.id, "f" * 64]
                for message, body in data.draw(
                    st.lists(wild_messages(sessions, ids, ann.artefact), max_size=10)
                ):
                    await wicked.say(peer, message, body)

            exact(events + [event async for event in answer])
            for session in SESSIONS:
                for peer in (ann, bob):
                    await wicked.say(peer, Close(session))
            await emptied(ann, bob)
            again = [event async for event in swarm.ask(PROMPT, new=5)]
            assert tokens(again) == expected_tokens(tuple(PROMPT), 5)

    asyncio.run(scene())


async def test_a_message_that_nobody_honest_sends_closes_the_channel_it_came_by_and_no_other() -> None:
    async with two_peers() as (swarm, ann, bob), mallory(swarm) as wicked:
        answer = swarm.ask(PROMPT, new=LONG)
        events: list[object] = [await anext(answer)]
        between = ann.dialer.channels[bob.identity.id]

        channel = await wicked.say(bob, Opened("1" * 32, 0, 0))
        await asyncio.wait_for(channel.closed.wait(), SOON_S)

        assert channel.reason == "a Opened is for askers, and I asked for nothing"
        exact(events + [event async for event in answer])
        assert ann.dialer.channels[bob.identity.id] is between and not between.closed.is_set()


async def test_an_asker_cannot_cut_two_honest_peers_apart(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with two_peers() as (swarm, ann, bob), mallory(swarm) as wicked:
        answer = swarm.ask(PROMPT, new=LONG)
        events: list[object] = [await anext(answer)]
        between = ann.dialer.channels[bob.identity.id]
        route = [RouteSpan(ann.identity.id, 0, 3), RouteSpan(bob.identity.id, 3, LAYERS)]
        opened = Open(
            session=SESSIONS[0],
            epoch=0,
            artefact=ann.artefact,
            route=route,
            index=0,
            max_tokens=40,
            prompt_length=1,
            credit=40,
            sampling=Sampling(),
        )
        await wicked.say(ann, opened)
        assert isinstance(await asyncio.wait_for(wicked.heard.get(), SOON_S), Opened)

        # With ann's own there would be 513, more than bob may take.
        hops = [Hop("f" * 64, 0, 1, 0, 0, "local")] * 512
        step = Step(session=SESSIONS[0], epoch=0, position=0, count=1, tensor=Tensor("int32", [1]), hops=hops)
        await wicked.say(ann, step, ids_body([1]))

        assert isinstance(await asyncio.wait_for(wicked.heard.get(), SOON_S), Failed)
        exact(events + [event async for event in answer])
        assert ann.dialer.channels[bob.identity.id] is between and not between.closed.is_set()
        assert "Traceback" not in caplog.text
