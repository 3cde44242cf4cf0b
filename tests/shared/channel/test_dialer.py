"""Dialling over several relays, and channels that outlive a relay's absence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from relay.app import Relay
from relay.settings import RelaySettings
from shared.channel import Dialer, dialer, relayed
from shared.channel import channel as channel_file
from shared.errors import ConnectionLost
from shared.identity import Identity
from shared.relay_client import RelayClient
from tests.harness.evil_relay import EvilConnection, EvilRelay
from tests.shared.channel.ends import End, expect_numbers, mute, numbered, send_numbers, until


async def test_a_channel_outlives_a_restart_of_its_relay() -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(AsyncExitStack())
        relay = await first.enter_async_context(Relay(RelaySettings(port=0)))
        settings = RelaySettings(port=int(relay.url.rsplit(":", 1)[1]))
        made = []
        for _ in range(2):
            identity = Identity.generate()
            client = await stack.enter_async_context(RelayClient(relay.url, identity))
            made.append(End(identity, client, direct=False))
        ann, bob = made
        for end in made:
            await stack.enter_async_context(end.dialer)
        channel = await ann.dialer.channel(bob.id)

        with channel.watched():
            sending = asyncio.create_task(send_numbers(channel, range(300), pause_s=0.001))
            await until(lambda: bob.inbox.qsize() > 30)
            await first.aclose()
            await stack.enter_async_context(Relay(settings))
            await expect_numbers(bob, range(300))
            await sending

        assert ann.channel_to(bob) is channel


def both_at(relays: Sequence[EvilRelay]) -> tuple[End, End, list[EvilConnection], list[EvilConnection]]:
    """Two ends, each connected to all of the relays."""
    made = []
    for _ in range(2):
        identity = Identity.generate()
        connections = [relay.connect(identity) for relay in relays]
        end = End(identity, connections[0], direct=False)
        end.dialer = Dialer(
            identity, connections, end._received, direct=False, on_closed=end.closed.put_nowait
        )
        made.append((end, connections))
    (ann, at_ann), (bob, at_bob) = made
    return ann, bob, at_ann, at_bob


async def test_with_two_relays_an_offer_counts_once() -> None:
    ann, bob, _, _ = both_at([EvilRelay(), EvilRelay()])
    async with ann.dialer, bob.dialer:
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1))

        assert (await bob.got()).number == 1
        assert len(bob.dialer._by_tag) == 1


async def test_a_stream_moves_to_the_other_relay_when_one_is_lost() -> None:
    ann, bob, at_ann, at_bob = both_at([EvilRelay(), EvilRelay()])
    async with ann.dialer, bob.dialer:
        channel = await ann.dialer.channel(bob.id)
        with channel.watched():
            sending = asyncio.create_task(send_numbers(channel, range(300), pause_s=0.001))
            await until(lambda: bob.inbox.qsize() > 30)
            at_ann[0].set_connected(False)
            at_bob[0].set_connected(False)
            await expect_numbers(bob, range(300))
            await sending


async def test_a_peer_is_gone_when_no_relay_has_it() -> None:
    relays = [EvilRelay(), EvilRelay()]
    ann, bob, _, _ = both_at(relays)
    async with ann.dialer, bob.dialer:
        channel = await ann.dialer.channel(bob.id)
        relays[0].vanish(bob.id)
        await channel.send(numbered(1))
        assert (await bob.got()).number == 1

        mute(bob.channel_to(ann))
        started = time.perf_counter()
        relays[1].vanish(bob.id)
        await channel.closed.wait()

        assert time.perf_counter() - started < 0.5
        with pytest.raises(ConnectionLost, match="any relay of ours"):
            await ann.dialer.channel(bob.id)


async def test_a_relay_that_lost_the_peer_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells when a peer comes back to a relay: Bob's two connections are renewed in turn."""
    monkeypatch.setattr(relayed, "ABSENT_S", 0.02)
    relays = [EvilRelay(), EvilRelay()]
    ann, bob, _, at_bob = both_at(relays)
    async with ann.dialer, bob.dialer:
        channel = await ann.dialer.channel(bob.id)
        for number, lost in enumerate([0, 1, 0, 1]):
            relays[lost].vanish(bob.id)
            await channel.send(numbered(number))
            assert (await bob.got()).number == number
            relays[lost].connections[bob.id] = at_bob[lost]
            await asyncio.sleep(0.05)


async def test_a_short_absence_from_the_relay_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_file, "WATCHED", channel_file.WATCHED._replace(tick_s=0.02))
    ann, bob, [at_ann], _ = both_at([EvilRelay()])
    async with ann.dialer, bob.dialer:
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(0))
        await bob.got()
        with channel.watched():
            at_ann.set_connected(False)
            sending = asyncio.create_task(channel.send(numbered(1)))
            await asyncio.sleep(0.5)
            at_ann.set_connected(True)
            await sending

            assert (await bob.got()).number == 1


async def test_a_long_absence_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_file, "RELAY_AWAY_S", 0.3)
    ann, bob, [at_ann], _ = both_at([EvilRelay()])
    async with ann.dialer, bob.dialer:
        channel = await ann.dialer.channel(bob.id)
        with channel.watched():
            at_ann.set_connected(False)
            await asyncio.wait_for(channel.closed.wait(), 2)


async def test_a_restarted_peer_gets_a_new_channel_in_place_of_the_old() -> None:
    relay = EvilRelay()
    ann, bob, _, _ = both_at([relay])
    async with ann.dialer, bob.dialer:
        old = await ann.dialer.channel(bob.id)
        await until(lambda: bob.dialer.channels)
        # Bob's new process, under the same id; the old one is simply no longer heard.
        reborn = End(bob.identity, relay.connect(bob.identity), direct=False)
        async with reborn.dialer:
            new = await reborn.dialer.channel(ann.id)
            await new.send(numbered(1))

            assert (await ann.got()).channel is ann.channel_to(bob)
            assert old.closed.is_set()
            assert "newer channel" in old.reason
            assert await ann.closed.get() is old


async def test_an_offer_whose_maker_never_speaks_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialer, "DIAL_TIMEOUT_S", 0.2)
    relay = EvilRelay()
    ann, bob, _, _ = both_at([relay])
    async with ann.dialer, bob.dialer:
        relay.frames = lambda sender, receiver, sealed: []
        await ann.dialer.channel(bob.id)
        assert bob.dialer._unproven

        await until(lambda: not bob.dialer._by_tag)
        assert not bob.dialer.channels
        assert bob.closed.empty()


async def test_too_many_channels_are_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialer, "MAX_CHANNELS", 0)
    ann, bob, _, _ = both_at([EvilRelay()])
    async with ann.dialer, bob.dialer:
        with pytest.raises(ConnectionLost, match="did not answer"):
            await ann.dialer.channel(bob.id, timeout=0.1)


async def test_nobody_dials_oneself_or_after_the_end() -> None:
    ann, bob, _, _ = both_at([EvilRelay()])
    async with ann.dialer:
        with pytest.raises(ConnectionLost, match="itself"):
            await ann.dialer.channel(ann.id)
    with pytest.raises(ConnectionLost, match="closed"):
        await ann.dialer.channel(bob.id)


async def test_leaving_while_dialling_fails_the_callers() -> None:
    relay = EvilRelay()
    relay.signals = lambda sender, signal: []
    ann, bob, _, _ = both_at([relay])
    async with ann.dialer:
        calling = asyncio.create_task(ann.dialer.channel(bob.id))
        await asyncio.sleep(0)
    with pytest.raises(ConnectionLost, match="this side stops"):
        await calling
