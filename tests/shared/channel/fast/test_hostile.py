"""A peer that means harm, behind a good DTLS handshake: nothing raises, and nothing grows."""

from __future__ import annotations

import random
import struct

import pytest

from shared.channel.fast.chunks import DATA, FIRST, MAX_GAPS, SACK, WHOLE, Envelope, data_chunk
from shared.channel.fast.inbound import MAX_HELD
from shared.channel.fast.sctp import FastSctpTransport
from shared.channel.webrtc import best_transports
from tests.harness.direct_links import Side, linked

FAST = best_transports()
# All but ABORT, which ends the association, as it should.
CHUNK_TYPES = (DATA, SACK, 1, 2, 4, 5, 7, 8, 9, 10, 11, 14, 130, 192, 193, 255)


def sctp_of(side: Side) -> FastSctpTransport:
    sctp = side.link._sctp
    assert isinstance(sctp, FastSctpTransport)
    return sctp


class Evil:
    """Sends what it likes as the true other side, whose keys and tags it has."""

    def __init__(self, victim: Side) -> None:
        self.victim = sctp_of(victim)
        theirs, inbound = self.victim._theirs, self.victim._inbound
        assert theirs is not None
        assert inbound is not None
        self.envelope: Envelope = theirs
        self.inbound = inbound

    @property
    def next_tsn(self) -> int:
        return self.inbound.cumulative + 1

    def says(self, *chunks: bytes) -> None:
        self.victim.packet_received(self.envelope.sealed(b"".join(chunks)))


def chunk(kind: int, body: bytes, flags: int = 0, length: int | None = None) -> bytes:
    size = 4 + len(body) if length is None else length
    return struct.pack("!BBH", kind, flags, size) + body + bytes(-len(body) & 3)


async def still_works(ann: Side, bob: Side) -> None:
    before = bob.count
    await ann.send(b"still here")
    assert (await bob.got(before + 1))[-1] == b"still here"


@pytest.mark.parametrize("seed", range(4))
async def test_no_packet_raises(seed: int) -> None:
    """Any bytes at all, and any chunks with good checksums."""
    chance = random.Random(seed)
    async with linked(FAST, FAST) as (_, bob):
        evil = Evil(bob)
        for _ in range(2000):
            evil.victim.packet_received(chance.randbytes(chance.randrange(200)))
            body = chance.randbytes(chance.randrange(60))
            length = chance.choice([None, chance.randrange(70)])
            evil.says(chunk(chance.choice(CHUNK_TYPES), body, chance.randrange(8), length))
        evil.victim.batch_received()


async def test_a_message_without_end_ends_the_link() -> None:
    async with linked(FAST, FAST) as (_, bob):
        evil = Evil(bob)
        for number in range(300):
            flags = FIRST if number == 0 else 0
            evil.says(data_chunk(flags, evil.next_tsn, 0, 0, 53, bytes(1160)))

        assert bob.link.lost.is_set()


async def test_pieces_behind_a_gap_are_held_up_to_the_window() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        evil = Evil(bob)
        first = evil.next_tsn
        for number in range(1, 2 * MAX_HELD):
            evil.says(data_chunk(WHOLE, first + number, 0, 0, 53, bytes(1160)))

        assert evil.inbound.room_bytes < 1160
        assert len(evil.inbound._held) <= MAX_HELD
        await still_works(bob, ann)


async def test_data_for_channels_that_nobody_opened_leaves_nothing_behind() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        evil = Evil(bob)
        for stream in range(1, 2000):
            evil.says(data_chunk(WHOLE, evil.next_tsn, stream, 0, 53, b"x"))

        assert bob.count == 0
        assert len(evil.victim._data_channels) == 1
        assert not evil.victim._inbound_streams
        # The true other side does not know of these numbers, so only the way back still works.
        await still_works(bob, ann)


async def test_a_repeated_handshake_does_not_set_our_numbers_back() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        evil = Evil(bob)
        init = chunk(1, struct.pack("!LLHHL", 7, 1 << 20, 10, 10, 12345))
        evil.victim.packet_received(
            Envelope(5000, 5000, 0).sealed(init)  # an INIT carries no tag
        )
        await still_works(ann, bob)
        await still_works(bob, ann)


async def test_acknowledgements_of_what_was_never_sent_are_ignored() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        evil = Evil(bob)
        for distance in (1, 5, 2**20, 2**31 - 1, 2**31, 2**32 - 1):
            outbound = evil.victim._outbound
            assert outbound is not None
            tsn = (outbound.next_tsn - 1 + distance) & 0xFFFF_FFFF
            gaps = struct.pack("!HH", 1, 0xFFFF) * MAX_GAPS
            evil.says(chunk(SACK, struct.pack("!LLHH", tsn, 1 << 20, MAX_GAPS, 0) + gaps))

        await still_works(bob, ann)
        await still_works(ann, bob)


async def test_a_reader_that_takes_nothing_bounds_what_we_hold() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        evil = Evil(bob)
        outbound = evil.victim._outbound
        assert outbound is not None
        closed = struct.pack("!LLHH", (outbound.next_tsn - 1) & 0xFFFF_FFFF, 0, 0, 0)
        evil.says(chunk(SACK, closed))
        ann.link._dtls.records = lambda records, count: None  # type: ignore[attr-defined]
        sent = 0
        while bob.link.ready:
            bob.link.send(bytes(16_400))
            sent += 1

        assert sent < 10
        assert outbound.flight_bytes + outbound.waiting_bytes < 40_000


async def test_a_channel_that_the_other_side_opens_is_not_ours() -> None:
    async with linked(FAST, FAST) as (_, bob):
        evil = Evil(bob)
        opening = struct.pack("!BBHLHH", 3, 0, 0, 0, 3, 0) + b"new"
        evil.says(data_chunk(WHOLE, evil.next_tsn, 4, 0, 50, opening))

        assert bob.link.lost.is_set()


async def test_an_abort_ends_the_link() -> None:
    async with linked(FAST, FAST) as (_, bob):
        Evil(bob).says(chunk(6, b""))

        assert bob.link.lost.is_set()
