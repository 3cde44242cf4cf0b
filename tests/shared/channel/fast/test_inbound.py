"""Pieces that come in any order, twice or never: messages come out once and in order, and little is held."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.channel.fast.chunks import FIRST, LAST, MAX_DUPLICATES, MAX_GAPS, TSN_MASK, WHOLE, Data
from shared.channel.fast.inbound import MAX_HELD, MAX_MESSAGE_BYTES, Inbound, TooLong

WINDOW_BYTES = 1 << 20


class Receiver:
    def __init__(self, cumulative: int = 0, window_bytes: int = WINDOW_BYTES) -> None:
        self.messages: list[tuple[int, int, bytes]] = []
        self.inbound = Inbound(cumulative, window_bytes, lambda *message: self.messages.append(message))

    def hears(self, *pieces: Data) -> None:
        for piece in pieces:
            self.inbound.receive(piece)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        return self.inbound.acknowledged()[2]


def piece(tsn: int, flags: int = WHOLE, payload: bytes = b"x", stream: int = 0) -> Data:
    return Data(tsn & TSN_MASK, flags, stream, 53, payload)


def cut(messages: list[bytes], first_tsn: int, size: int = 3) -> list[Data]:
    pieces: list[Data] = []
    for message in messages:
        parts = [message[place : place + size] for place in range(0, len(message), size)]
        for number, part in enumerate(parts):
            flags = (FIRST if number == 0 else 0) | (LAST if number == len(parts) - 1 else 0)
            pieces.append(piece(first_tsn + len(pieces), flags, part))
    return pieces


MESSAGES = st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=12)


@given(MESSAGES, st.randoms(use_true_random=False), st.sampled_from([1, 2**32 - 5, 2**31 - 3]))
def test_messages_come_once_and_in_order_however_their_pieces_come(
    messages: list[bytes], chance: random.Random, first_tsn: int
) -> None:
    pieces = cut(messages, first_tsn)
    receiver = Receiver((first_tsn - 1) & TSN_MASK)
    arriving = pieces + chance.sample(pieces, len(pieces) // 2)
    chance.shuffle(arriving)
    receiver.hears(*arriving)
    cumulative, room, gaps, _ = receiver.inbound.acknowledged()

    assert [message for _, _, message in receiver.messages] == messages
    assert cumulative & TSN_MASK == (first_tsn + len(pieces) - 1) & TSN_MASK
    assert (room, gaps) == (WINDOW_BYTES, [])


@given(st.sets(st.integers(1, 60)))
def test_gaps_tell_exactly_what_came_early(offsets: set[int]) -> None:
    receiver = Receiver()
    arriving = list(offsets)
    random.Random(1).shuffle(arriving)
    receiver.hears(*(piece(offset) for offset in arriving))
    cumulative, _, gaps, _ = receiver.inbound.acknowledged()

    told = {cumulative + offset for first, last in gaps for offset in range(first, last + 1)}
    assert told == {offset for offset in offsets if offset > cumulative}
    assert set(range(1, cumulative + 1)) <= offsets
    assert all(first > 1 for first, _ in gaps)


def test_a_duplicate_is_told_once() -> None:
    receiver = Receiver()
    receiver.hears(piece(1), piece(1), piece(3), piece(3))

    assert receiver.inbound.acknowledged()[3] == [1, 3]
    assert receiver.inbound.acknowledged()[3] == []
    assert len(receiver.messages) == 1


def test_what_exceeds_the_window_is_dropped_and_not_acknowledged() -> None:
    receiver = Receiver(window_bytes=250)
    receiver.hears(*(piece(tsn, payload=bytes(100)) for tsn in (2, 3, 4)))

    assert receiver.gaps == [(2, 3)]
    assert receiver.inbound.room_bytes == 50
    receiver.hears(piece(1, payload=bytes(100)))
    assert len(receiver.messages) == 3
    assert receiver.inbound.room_bytes == 250


def test_pieces_of_a_byte_each_do_not_bloat_us() -> None:
    receiver = Receiver()
    receiver.hears(*(piece(tsn) for tsn in range(2, 3 * MAX_HELD)))

    assert len(receiver.inbound._held) == MAX_HELD
    assert receiver.gaps == [(2, MAX_HELD + 1)]


def test_no_more_gaps_and_duplicates_are_told_than_fit_into_a_packet() -> None:
    receiver = Receiver()
    receiver.hears(*(piece(tsn) for tsn in range(2, 2000, 2)), *(piece(2) for _ in range(100)))
    _, _, gaps, duplicates = receiver.inbound.acknowledged()

    assert (len(gaps), len(duplicates)) == (MAX_GAPS, MAX_DUPLICATES)


def test_what_no_gap_could_report_is_dropped() -> None:
    receiver = Receiver()
    receiver.hears(piece(0x10000), piece(0xFFFF))

    assert receiver.gaps == [(0xFFFF, 0xFFFF)]


def test_a_message_without_end_is_refused() -> None:
    receiver = Receiver()
    receiver.hears(piece(1, FIRST, bytes(MAX_MESSAGE_BYTES)))
    with pytest.raises(TooLong, match="exceeds 262144 bytes"):
        receiver.hears(piece(2, 0, b"x"))


def test_pieces_that_belong_to_nothing_are_acknowledged_and_forgotten() -> None:
    receiver = Receiver()
    receiver.hears(piece(1, 0), piece(2, LAST), piece(3, FIRST), piece(4, LAST, stream=9), piece(5, FIRST))
    receiver.hears(piece(6, WHOLE, b"whole"))

    assert [message for _, _, message in receiver.messages] == [b"whole"]
    assert receiver.inbound.room_bytes == WINDOW_BYTES


def test_what_the_other_side_gave_up_no_longer_holds_back_the_rest() -> None:
    receiver = Receiver()
    receiver.hears(piece(1, FIRST), piece(3, LAST), piece(4, WHOLE, b"later"), piece(6, WHOLE, b"last"))
    receiver.inbound.forward(3)

    assert [message for _, _, message in receiver.messages] == [b"later"]
    receiver.inbound.forward(5)
    assert [message for _, _, message in receiver.messages] == [b"later", b"last"]
    assert receiver.gaps == []
    assert receiver.inbound.room_bytes == WINDOW_BYTES


def test_giving_up_half_of_all_numbers_costs_us_nothing() -> None:
    receiver = Receiver()
    receiver.inbound.forward(0x7FFF_0000)

    assert receiver.inbound.cumulative == 0
