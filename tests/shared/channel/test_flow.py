"""Flow: whatever paths lose, repeat or reorder, the receiver gets every message once and in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.channel.flow import WINDOW_FRAMES, Inbound, Outbound, Sent
from shared.channel.path_choice import WINDOW_LEAST_BYTES, WINDOW_MOST_BYTES
from shared.channel.path_choice import WINDOW_START_BYTES as WINDOW_BYTES
from shared.errors import ProtocolError
from shared.framing import (
    CHUNK_BYTES,
    LONG_CHUNK_BYTES,
    PEER_WIRE,
    WHOLE_BYTES,
    Priority,
    Splitter,
    read_header,
    whole_frame,
)


def queue(outbound: Outbound, number: int, size: int, priority: Priority) -> None:
    splitter = Splitter(b"%d" % number, memoryview(bytes(size)), priority, stream=priority)
    outbound.waiting[priority].append(splitter)


def push(inbound: Inbound, sent: Sent) -> None:
    inbound.push(read_header(sent.data), sent.data, "relayed")


def take_all(outbound: Outbound) -> list[Sent]:
    frames = []
    while (taken := outbound.take()) is not None:
        frames.append(taken[0])
    return frames


def read_all(inbound: Inbound) -> list[int]:
    numbers = []
    while (arrived := inbound.next()) is not None:
        numbers.append(int(bytes(arrived.message.meta)))
        inbound.handled()
    return numbers


class Wire:
    """One link under test: keeps the order, loses everything at once or some frames by an evil hand."""

    def __init__(self) -> None:
        self.carried = 0
        self.delivered = 0
        self.flying: list[Sent | int] = []

    def send(self, sent: Sent) -> None:
        self.carried += 1
        sent.link, sent.place = self, self.carried
        self.flying.append(sent)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_message_arrives_once_whatever_two_links_do(data: st.DataObject) -> None:
    outbound, inbound = Outbound(), Inbound()
    wires = [Wire(), Wire()]
    sent_numbers: dict[Priority, list[int]] = {priority: [] for priority in Priority}
    got: list[int] = []
    for number in range(data.draw(st.integers(1, 30))):
        priority = data.draw(st.sampled_from(Priority))
        queue(outbound, number, data.draw(st.sampled_from([0, 100, CHUNK_BYTES, 3 * CHUNK_BYTES])), priority)
        sent_numbers[priority].append(number)

    def deliver(wire: Wire, count: int) -> None:
        for _ in range(min(count, len(wire.flying))):
            item = wire.flying.pop(0)
            if isinstance(item, int):
                outbound.answered(wire, item, inbound.received)
            else:
                push(inbound, item)

    for _ in range(data.draw(st.integers(0, 60))):
        wire = data.draw(st.sampled_from(wires))
        match data.draw(st.sampled_from(["send", "deliver", "lose", "ping", "break", "consume"])):
            case "send":
                if (taken := outbound.take()) is not None:
                    wire.send(taken[0])
            case "deliver":
                deliver(wire, data.draw(st.integers(1, 8)))
            case "lose" if wire.flying:
                wire.flying.pop(data.draw(st.integers(0, len(wire.flying) - 1)))
            case "ping":
                wire.flying.append(wire.carried)
            case "break":
                wire.flying.clear()
                outbound.link_lost(wire)
            case "consume":
                got += read_all(inbound)
                if (received := inbound.credit()) is not None:
                    outbound.consumed(received)

    # From now on both links behave; a ping on each tells what was lost, one gap after the other.
    for _ in range(200):
        for sent in take_all(outbound):
            wires[0].send(sent)
        for wire in wires:
            wire.flying.append(wire.carried)
            deliver(wire, len(wire.flying))
        got += read_all(inbound)
        outbound.consumed(inbound.settle())
    assert sorted(got) == sorted(number for numbers in sent_numbers.values() for number in numbers)
    for numbers in sent_numbers.values():
        assert [number for number in got if number in set(numbers)] == numbers
    assert not outbound.unconsumed
    assert outbound.idle


def test_the_window_bounds_what_is_sent_and_leaves_room_for_the_urgent() -> None:
    outbound = Outbound()
    queue(outbound, 0, 4 * WINDOW_BYTES, Priority.PREFILL)
    prefill = sum(len(sent.data) for sent in take_all(outbound))
    queue(outbound, 1, 4 * WINDOW_BYTES, Priority.DECODE)
    decode = sum(len(sent.data) for sent in take_all(outbound))
    queue(outbound, 2, 4 * WINDOW_BYTES, Priority.CONTROL)
    control = sum(len(sent.data) for sent in take_all(outbound))

    assert min(prefill, decode, control) > 0
    assert prefill <= WINDOW_BYTES * 3 // 4
    assert prefill + decode + control <= WINDOW_BYTES


def test_small_messages_are_bounded_by_their_number() -> None:
    outbound = Outbound()
    frames = 0
    while outbound.straight(Priority.CONTROL, b"{}", b""):
        frames += 1

    assert frames == WINDOW_FRAMES


def test_an_urgent_message_is_not_cut_where_a_prompt_would_be() -> None:
    outbound, body = Outbound(), bytes(2 * CHUNK_BYTES)

    assert outbound.straight(Priority.DECODE, b"{}", body) is not None
    assert outbound.straight(Priority.PREFILL, b"{}", body) is None
    assert outbound.straight(Priority.DECODE, b"{}", bytes(WHOLE_BYTES)) is None


def test_the_urgent_go_first_chunk_by_chunk() -> None:
    outbound = Outbound()
    queue(outbound, 0, 3 * CHUNK_BYTES, Priority.PREFILL)
    first = outbound.take()
    queue(outbound, 1, 10, Priority.DECODE)
    queue(outbound, 2, 10, Priority.CONTROL)

    assert first is not None
    streams = [read_header(sent.data).stream for sent in take_all(outbound)]
    assert streams[:2] == [Priority.CONTROL, Priority.DECODE]
    assert set(streams[2:]) == {Priority.PREFILL}


def test_a_message_does_not_overtake_one_of_its_own_priority() -> None:
    outbound = Outbound()
    queue(outbound, 0, 2 * CHUNK_BYTES, Priority.DECODE)

    assert outbound.straight(Priority.DECODE, b"1", b"") is None
    assert outbound.straight(Priority.PREFILL, b"1", b"") is None
    assert outbound.straight(Priority.CONTROL, b"1", b"") is not None


def test_a_sender_that_ignores_its_credit_is_found_out() -> None:
    inbound = Inbound()
    frame = whole_frame(PEER_WIRE, Priority.DECODE, 1, b"{}", bytes(CHUNK_BYTES - 2))
    with pytest.raises(ProtocolError, match="credit"):
        for number in range(1, 2 * WINDOW_MOST_BYTES // CHUNK_BYTES):
            inbound.push(read_header(frame)._replace(sequence=number), frame, "relayed")


def test_a_sender_that_leaves_a_gap_for_ever_is_found_out() -> None:
    inbound = Inbound()
    frame = whole_frame(PEER_WIRE, Priority.DECODE, 1, b"{}", b"")
    with pytest.raises(ProtocolError, match="ahead"):
        for number in range(2, 2 * WINDOW_FRAMES):
            inbound.push(read_header(frame)._replace(sequence=number), frame, "relayed")


def test_nobody_can_acknowledge_what_was_not_sent() -> None:
    with pytest.raises(ProtocolError, match="acknowledged"):
        Outbound().consumed(1)


def test_numbers_go_on_past_32_bits() -> None:
    outbound, inbound = Outbound(), Inbound()
    outbound.last = inbound.received = inbound._counted = inbound._credited = (1 << 32) - 3
    for _ in range(8):
        sent = outbound.straight(Priority.DECODE, b"7", b"")
        assert sent is not None
        push(inbound, sent)
        push(inbound, sent)

    assert read_all(inbound) == [7] * 8
    assert inbound.repeated == 8
    outbound.consumed(inbound.settle())
    assert not outbound.unconsumed


@pytest.mark.parametrize("priority", Priority)
def test_the_least_window_takes_the_longest_frame_of_every_priority(priority: Priority) -> None:
    outbound = Outbound()
    outbound.resize(WINDOW_LEAST_BYTES)
    queue(outbound, 0, 4 * WINDOW_LEAST_BYTES, priority)
    assert outbound.take(LONG_CHUNK_BYTES) is not None
