"""Announcements, lookups and watches through a real relay, and how everyone hears that somebody has gone."""

from __future__ import annotations

import asyncio
import time

from relay.app import Relay
from relay.settings import Rate, RelaySettings
from shared.identity import Identity
from shared.protocol import Announce, Found, Gone, Lookup, Signal, SignedRecord
from tests.relay.parties import announced, member, party, said, soon

GREETING = SignedRecord('{"any":"text"}', "0" * 128)


async def test_what_one_announces_others_find(relay: Relay) -> None:
    async with party(relay) as ann, party(relay) as bob:
        record = announced(ann.identity)
        await ann.client.announce(record)
        await ann.client.lookup()  # answered after the announcement, on the same connection

        assert await bob.client.lookup() == [record]
        assert await bob.client.lookup("demo") == [record]
        assert await bob.client.lookup("another model") == []


async def test_a_lease_runs_out() -> None:
    now = time.time()
    clock = [now]
    async with Relay(RelaySettings(port=0), clock=lambda: clock[0]) as relay, party(relay) as ann:
        await ann.client.announce(announced(ann.identity, now))
        assert len(await ann.client.lookup()) == 1

        clock[0] = now + 46
        assert await ann.client.lookup() == []


async def test_a_watcher_hears_what_is_and_what_comes(relay: Relay) -> None:
    async with party(relay) as ann, party(relay) as bob, party(relay) as eve:
        first = announced(ann.identity)
        await ann.client.announce(first)
        await ann.client.lookup()
        eve.watch()
        await eve.hears(first)

        second = announced(bob.identity, start=4, end=8)
        await bob.client.announce(second)
        await eve.hears(second)

        leaving = announced(ann.identity, time.time() + 1, state="left")
        await ann.client.announce(leaving)
        await eve.hears(leaving)


async def test_one_may_watch_a_single_model(relay: Relay) -> None:
    async with party(relay) as ann, party(relay) as bob, party(relay) as eve:
        eve.watch("large")
        await eve.client.lookup()
        await ann.client.announce(announced(ann.identity, model="small"))
        await bob.client.announce(announced(bob.identity, model="large"))

        assert said(await soon(eve.heard.records)).model == "large"
        assert eve.heard.records.empty()


async def test_an_announcement_that_is_refused_is_told_why(relay: Relay) -> None:
    async with party(relay) as ann:
        now = time.time()
        await ann.client.announce(announced(ann.identity, now - 1000))
        assert "expired" in await soon(ann.heard.denied)
        await ann.client.announce(announced(ann.identity, now + 500, sequence=1))
        assert "ahead" in await soon(ann.heard.denied)
        await ann.client.announce(announced(ann.identity, now, sequence=2))
        await ann.client.announce(announced(ann.identity, now, sequence=1))
        assert "not newer than 2" in await soon(ann.heard.denied)
        good = announced(ann.identity, now, sequence=2)
        await ann.client.announce(SignedRecord(good.body + " ", good.signature))
        assert "not signed by" in await soon(ann.heard.denied)

        assert len(await ann.client.lookup()) == 1  # and the connection is as good as before


async def test_a_watcher_hears_at_once_when_a_peer_is_killed(relay: Relay) -> None:
    async with party(relay) as eve, member(relay) as ann:
        eve.watch()
        await ann.say(Announce(announced(ann.identity)))
        await soon(eve.heard.records)

        ann.die()
        started = time.perf_counter()
        assert await soon(eve.heard.gone) == ann.identity.id
        assert time.perf_counter() - started < 0.5  # a few milliseconds, on a machine that is not busy


async def test_those_who_exchanged_frames_or_signals_hear_it_too(relay: Relay) -> None:
    async with party(relay) as bob, party(relay) as eve, party(relay) as zoe, member(relay) as ann:
        await ann.socket.send_bytes(bytes.fromhex(bob.id) + b"frame")
        await soon(bob.heard.frames)
        await ann.say(Signal(eve.id, GREETING))
        await soon(eve.heard.signals)

        ann.die()
        assert await soon(bob.heard.gone) == ann.identity.id
        assert await soon(eve.heard.gone) == ann.identity.id
        await zoe.client.lookup()
        assert zoe.heard.gone.empty()  # a stranger to ann


async def test_a_watcher_of_another_model_hears_nothing(relay: Relay) -> None:
    async with party(relay) as eve, party(relay) as bob, member(relay) as ann:
        eve.watch("large")
        await eve.client.lookup()
        bob.watch()
        await ann.say(Announce(announced(ann.identity, model="small")))
        await soon(bob.heard.records)

        ann.die()
        await soon(bob.heard.gone)
        await eve.client.lookup("large")
        assert eve.heard.gone.empty()


async def test_who_comes_later_is_told_who_has_gone(relay: Relay) -> None:
    async with member(relay) as ann, party(relay) as bob:
        await ann.say(Announce(announced(ann.identity)))
        bob.watch()
        await soon(bob.heard.records)
        ann.die()
        await soon(bob.heard.gone)

        async with party(relay) as eve:
            eve.watch()
            await soon(eve.heard.records)
            assert await soon(eve.heard.gone) == ann.identity.id


async def test_who_returns_is_announced_again(relay: Relay) -> None:
    identity = Identity.generate()
    record = announced(identity)
    async with party(relay) as eve:
        eve.watch()
        async with member(relay, identity) as ann:
            await ann.say(Announce(record))
            await soon(eve.heard.records)
            ann.die()
            await soon(eve.heard.gone)
        async with member(relay, identity):
            await eve.hears(record)


async def test_a_large_map_comes_in_several_parts(relay: Relay) -> None:
    now = time.time()
    records = {}
    for _ in range(120):
        identity = Identity.generate()
        record = announced(identity, now, relays=["https://relay.example.org/" + "x" * 150] * 4)
        async with member(relay, identity) as peer:
            await peer.say(Announce(record))
            await peer.say(Lookup(request=1, model="nothing"))
            await peer.hear()
        records[identity.id] = record
    async with member(relay) as wire:
        await wire.say(Lookup(request=7))
        parts = [await wire.hear()]
        while isinstance(parts[-1], Found) and parts[-1].more:
            parts.append(await wire.hear())
        gone = {message.peer for _ in records if isinstance(message := await wire.hear(), Gone)}

    assert len(parts) > 2 and all(isinstance(part, Found) and part.request == 7 for part in parts)
    assert {record for part in parts if isinstance(part, Found) for record in part.records} == set(
        records.values()
    )
    assert gone == set(records)


async def test_signals_arrive_as_they_were_sent(relay: Relay) -> None:
    async with party(relay) as ann, party(relay) as bob:
        await ann.client.send_signal(Signal(bob.id, GREETING))
        assert await soon(bob.heard.signals) == Signal(bob.id, GREETING)

        nobody = Identity.generate().id
        await ann.client.send_signal(Signal(nobody, GREETING))
        assert await soon(ann.heard.gone) == nobody


async def test_many_watches_are_refused_with_a_hint(relay: Relay) -> None:
    async with member(relay) as wire:
        for number in range(16):
            await wire.say(Lookup(request=number + 1, model=f"m{number}", watch=True))
            assert isinstance(await wire.hear(), Found)
        await wire.say(Lookup(request=17, model="m16", watch=True))
        assert "watch all instead" in (await wire.denied()).reason
        await wire.say(Lookup(request=18, model="m0", watch=True))
        assert isinstance(await wire.hear(), Found)


async def test_a_relay_that_stops_says_so_and_when_to_return() -> None:
    async with Relay(RelaySettings(port=0)) as relay, member(relay) as wire:
        stopping = asyncio.create_task(relay.__aexit__(None, None, None))
        message = await wire.hear()
        assert type(message).__name__ == "Restarting"
        assert await wire.ended() == 1001
        await stopping


async def test_who_asks_too_often_is_read_more_slowly_and_nobody_else() -> None:
    settings = RelaySettings(port=0, participant_control=Rate(50, 5))
    async with Relay(settings) as relay, member(relay) as greedy, party(relay) as bob:
        started = time.perf_counter()
        for number in range(15):
            await greedy.say(Lookup(request=number + 1))
        assert await bob.client.lookup() == []
        bob_waited_s = time.perf_counter() - started
        for _ in range(15):
            assert isinstance(await greedy.hear(), Found)

        assert time.perf_counter() - started > 0.15
        assert bob_waited_s < 0.15
