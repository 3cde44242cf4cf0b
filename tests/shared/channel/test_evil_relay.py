"""What a relay that lies can do: delay and cut. Never read, alter, repeat, impersonate or sit in between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest

from shared.channel import channel as channel_file
from shared.channel.sealed import make_answer, make_offer
from shared.errors import ConnectionLost
from shared.identity import Identity, PeerId
from shared.protocol import Describe, Greeting, Signal, SignedRecord
from tests.harness.evil_relay import EvilRelay
from tests.shared.channel.ends import (
    End,
    body_of,
    both_direct,
    expect_numbers,
    numbered,
    send_numbers,
    until,
)


@asynccontextmanager
async def ends_at(relay: EvilRelay, count: int = 2, *, direct: bool = False) -> AsyncIterator[list[End]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            identity = Identity.generate()
            made.append(End(identity, relay.connect(identity), direct=direct))
        for end in made:
            await stack.enter_async_context(end.dialer)
        yield made


async def test_an_honest_one_serves_as_well_as_the_real_relay() -> None:
    async with ends_at(EvilRelay(), direct=True) as (ann, bob):
        channel = await both_direct(ann, bob)
        await channel.send(numbered(1), b"hello")

        assert (await bob.got()).body == b"hello"


async def test_it_sees_neither_messages_nor_addresses() -> None:
    relay = EvilRelay()
    seen: list[bytes] = []

    def look(sender: PeerId, receiver: PeerId, sealed: bytes) -> Iterable[bytes]:
        seen.append(sealed)
        return [sealed]

    relay.frames = look
    async with ends_at(relay, direct=True) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1), b"a very private message")
        await both_direct(ann, bob)

    everything = b"".join(seen)
    assert len(everything) > 1000
    for secret in (b"private", b"candidate", b"sha-256", b" udp ", b"token"):
        assert secret not in everything


async def test_altered_repeated_and_reordered_frames_only_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    relay = EvilRelay()
    chance = random.Random(1)
    withheld: list[bytes] = []

    def harm(sender: PeerId, receiver: PeerId, sealed: bytes) -> Iterable[bytes]:
        match chance.randrange(12):
            case 0:
                position = chance.randrange(len(sealed))
                yield (
                    sealed[:position]
                    + bytes([sealed[position] ^ 1 << chance.randrange(8)])
                    + sealed[position + 1 :]
                )
            case 1:
                yield sealed
                yield sealed
            case 2:
                withheld.append(sealed)
            case 3:
                yield sealed
                yield from withheld
                withheld.clear()
            case 4:
                yield sealed[: chance.randrange(len(sealed))]
                yield sealed
            case _:
                yield sealed

    # Quicker than life, so that the repairs take no seconds.
    monkeypatch.setattr(channel_file, "WATCHED", channel_file.WATCHED._replace(tick_s=0.02, dead=1000))
    async with ends_at(relay) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(0), body_of(0))
        await bob.got()
        relay.frames = harm
        with channel.watched(), bob.channel_to(ann).watched():
            sending = asyncio.create_task(send_numbers(channel, range(1, 300)))
            await expect_numbers(bob, range(1, 300))
            await sending

        assert bob.channel_to(ann).relayed.refused > 0


async def test_a_changed_greeting_makes_no_channel() -> None:
    relay = EvilRelay()
    eve = Identity.generate()

    def own_key(sender: PeerId, signal: Signal) -> Iterable[Signal]:
        """The offer's key is swapped for one whose secret the relay knows."""
        key = make_offer(eve, PeerId(signal.receiver), 0).greeting.key
        body = signal.record.body.split('"key":"')
        return [
            Signal(
                signal.receiver, SignedRecord(f'{body[0]}"key":"{key}{body[1][64:]}', signal.record.signature)
            )
        ]

    relay.signals = own_key
    async with ends_at(relay) as (ann, bob):
        with pytest.raises(ConnectionLost, match="did not answer"):
            await ann.dialer.channel(bob.id, timeout=0.3)

        assert bob.dialer.refused_signals == 1
        assert not bob.dialer.channels
        assert not bob.dialer._by_tag


async def test_it_cannot_answer_in_another_s_place() -> None:
    relay = EvilRelay()
    eve = Identity.generate()

    def impostor(sender: PeerId, signal: Signal) -> Iterable[Signal]:
        """Eve answers Ann's offer, once as herself and once with Bob's name on it."""
        offer = msgspec.json.decode(signal.record.body, type=Greeting)
        answer = make_answer(eve, offer, signal.record, offer.issued_at)
        named = answer.record.body.replace(eve.id, signal.receiver)
        relay.deliver_signal(Signal(sender, answer.record))
        relay.deliver_signal(Signal(sender, SignedRecord(named, answer.record.signature)))
        return []

    relay.signals = impostor
    async with ends_at(relay) as (ann, bob):
        with pytest.raises(ConnectionLost):
            await ann.dialer.channel(bob.id, timeout=0.3)

        assert ann.dialer.refused_signals == 2
        assert not ann.dialer.channels


async def test_an_offer_replayed_changes_nothing() -> None:
    relay = EvilRelay()
    offers: list[Signal] = []

    def record(sender: PeerId, signal: Signal) -> Iterable[Signal]:
        offers.append(signal)
        return [signal]

    relay.signals = record
    async with ends_at(relay) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1))
        await bob.got()
        back = bob.channel_to(ann)
        relay.deliver_signal(offers[0])
        relay.deliver_signal(offers[1])
        await channel.send(numbered(2))

        assert (await bob.got()).number == 2
        assert bob.channel_to(ann) is back
        assert bob.dialer.refused_signals == ann.dialer.refused_signals == 1


async def test_an_offer_kept_for_later_does_not_displace_a_channel() -> None:
    """Bob never saw it, so he answers; but nobody can prove to be its maker, and the true channel stays."""
    relay = EvilRelay()
    kept: list[Signal] = []

    def keep(sender: PeerId, signal: Signal) -> Iterable[Signal]:
        if not kept:
            kept.append(signal)
            return []
        return [signal]

    relay.signals = keep
    async with ends_at(relay) as (ann, bob):
        with pytest.raises(ConnectionLost):
            await ann.dialer.channel(bob.id, timeout=0.1)
        ann.dialer._fail(bob.id, "was given up")
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1))
        await bob.got()
        back = bob.channel_to(ann)

        relay.deliver_signal(kept[0])
        assert len(bob.dialer._unproven) == 1
        await channel.send(numbered(2))

        assert (await bob.got()).channel is back
        assert not back.closed.is_set()


async def test_a_direct_link_to_another_certificate_is_refused() -> None:
    """Should ever a wrong fingerprint be described, DTLS does not connect and the relay carries on."""
    async with ends_at(EvilRelay(), direct=True) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        described = channel._upgrade.described

        def swap(message: Describe) -> None:
            wrong = "sha-256 " + ":".join(["AB"] * 32)
            described(msgspec.structs.replace(message, fingerprint=wrong))

        channel._upgrade.described = swap  # type: ignore[method-assign]
        await until(lambda: channel._upgrade._remote is not None)
        await until(lambda: channel._upgrade._link is None)
        await channel.send(numbered(1))

        assert (await bob.got()).path == "relayed"
        assert channel.direct is None


async def test_rubbish_signals_are_counted_and_survived() -> None:
    relay = EvilRelay()
    async with ends_at(relay) as (ann, bob):
        for body in ("", "{}", "[]", "\ud800", '{"kind":"offer"}', "x" * 8000):
            relay.deliver_signal(Signal(bob.id, SignedRecord(body, "00" * 64)))
        channel = await ann.dialer.channel(bob.id)

        assert bob.dialer.refused_signals == 6
        assert not channel.closed.is_set()


async def test_frames_for_unknown_channels_are_ignored() -> None:
    relay = EvilRelay()
    async with ends_at(relay) as (ann, bob):
        for size in (0, 1, 7, 8, 16, 32, 1000):
            relay.deliver_frame(ann.id, bob.id, bytes(size))
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1))

        assert (await bob.got()).number == 1
