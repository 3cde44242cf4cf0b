"""Frames: whatever is cut is joined again, and nothing malformed gets further than a ProtocolError."""

from __future__ import annotations

from resource import RUSAGE_SELF, getrusage

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.framing import (
    ABANDONED,
    CHUNK_BYTES,
    FIRST,
    HEADER,
    HEADER_BYTES,
    LAST,
    LONG_CHUNK_BYTES,
    MAX_OPEN_MESSAGES,
    PEER_WIRE,
    WHOLE,
    Joiner,
    Message,
    Priority,
    Splitter,
    aligned,
    read_header,
    whole_frame,
)
from shared.protocol import MAX_BODY_BYTES, MAX_META_BYTES, Tensor
from shared.tensors import check_tensor, tensor_bytes


def cut(
    meta: bytes,
    body: bytes,
    priority: Priority = Priority.DECODE,
    stream: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[bytes]:
    splitter = Splitter(meta, memoryview(body), priority, stream)
    frames: list[bytes] = []
    while not splitter.finished:
        size = splitter.next_bytes(chunk_bytes)
        frames.append(splitter.take(len(frames) + 1, chunk_bytes))
        assert len(frames[-1]) == size
    return frames


def join(joiner: Joiner, frames: list[bytes]) -> list[Message]:
    messages = [joiner.push(read_header(frame), frame) for frame in frames]
    return [message for message in messages if message is not None]


metas = st.one_of(st.binary(min_size=1, max_size=64), st.integers(1, 3 * CHUNK_BYTES).map(lambda n: b"m" * n))
bodies = st.one_of(st.binary(max_size=64), st.integers(1, 5 * CHUNK_BYTES).map(lambda n: bytes(n - 1) + b"z"))


@given(metas, bodies)
def test_what_is_cut_is_joined_again(meta: bytes, body: bytes) -> None:
    frames = cut(meta, body)

    [message] = join(Joiner(), frames)

    assert (bytes(message.meta), bytes(message.body)) == (meta, body)
    assert all(len(frame) <= HEADER_BYTES + CHUNK_BYTES for frame in frames)
    assert len(frames) == -(-(len(meta) + len(body)) // CHUNK_BYTES)


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, LONG_CHUNK_BYTES])
def test_a_message_may_change_to_a_link_with_longer_chunks_half_way(chunk_bytes: int) -> None:
    body = bytes(range(256)) * 1000
    splitter = Splitter(b"meta", memoryview(body), Priority.PREFILL, stream=2)
    frames = [splitter.take(1)]
    while not splitter.finished:
        frames.append(splitter.take(len(frames) + 1, chunk_bytes))

    [message] = join(Joiner(), frames)

    assert bytes(message.body) == body
    assert max(len(frame) for frame in frames) == HEADER_BYTES + chunk_bytes


def test_a_message_that_fits_is_one_frame_however_it_is_made() -> None:
    [cut_frame] = cut(b"{}", b"body", Priority.DECODE, stream=1)

    assert cut_frame == whole_frame(PEER_WIRE, Priority.DECODE, 1, b"{}", b"body", stream=1)


def test_messages_on_different_streams_pass_between_each_others_frames() -> None:
    long, urgent = cut(b"long", bytes(3 * CHUNK_BYTES), stream=2), cut(b"urgent", b"!", stream=0)
    joiner = Joiner()

    assert [bytes(m.meta) for m in join(joiner, [*long[:2], *urgent, *long[2:]])] == [b"urgent", b"long"]


def test_a_body_starts_where_numbers_may_be_read_in_place() -> None:
    for length in range(1, 40):
        meta = aligned(b"x" * length)
        assert len(meta) % 16 == 0 and meta.rstrip() == b"x" * length


def test_a_message_given_up_half_way_leaves_room_for_the_next() -> None:
    splitter = Splitter(b"m", memoryview(bytes(2 * CHUNK_BYTES)), Priority.PREFILL, stream=2)
    frames = [splitter.take(1), splitter.abandon(2), *cut(b"next", b"", stream=2)]

    [message] = join(Joiner(), frames)

    assert splitter.finished
    assert bytes(message.meta) == b"next"


@pytest.mark.parametrize(("meta", "body"), [(0, 0), (MAX_META_BYTES + 1, 0), (1, MAX_BODY_BYTES + 1)])
def test_a_message_over_the_caps_is_not_cut(meta: int, body: int) -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        Splitter(
            bytes(meta),
            memoryview(bytes(1)).cast("B")[:0] if not body else memoryview(bytes(body)),
            Priority.DECODE,
            0,
        )


def header(kind: int, flags: int, stream: int, meta: int, body: int, payload: int) -> bytes:
    return HEADER.pack(kind, flags, stream, 1, meta, body) + bytes(payload)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        bytes(HEADER_BYTES - 1),
        header(2, WHOLE, 0, 1, 0, 1),
        header(1, 0x08 | WHOLE, 0, 1, 0, 1),
        header(1, 0x40 | WHOLE, 0, 1, 0, 1),
        header(1, WHOLE, 0, 0, 1, 1),
        header(1, WHOLE, 0, 1, 1, 1),
        header(1, WHOLE, 0, 1, 1, 3),
        header(1, FIRST, 0, 1, 1, 2),
        header(1, FIRST, 0, 1, 1, 0),
        header(1, FIRST, 0, MAX_META_BYTES + 1, 1, 2),
        header(1, FIRST, 0, 1, MAX_BODY_BYTES + 1, 2),
        header(1, LAST, 0, 1, 0, 1),
        header(1, LAST, 0, 0, 0, 0),
        header(1, ABANDONED, 0, 0, 0, 1),
        header(1, ABANDONED | LAST, 0, 0, 0, 0),
        header(0, FIRST, 0, 1, 1, 1),
        header(0, WHOLE, 1, 1, 0, 1),
        header(0, WHOLE, 0, 1, 1, 2),
        header(1, WHOLE, 0, 70_000, 0, 70_000),
    ],
)  # fmt: skip
def test_a_frame_whose_header_and_length_disagree_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_header(frame)


def test_a_stream_cannot_go_on_before_it_began_nor_begin_twice() -> None:
    first, middle, *_ = cut(b"m", bytes(3 * CHUNK_BYTES))

    with pytest.raises(ProtocolError, match="without having begun"):
        join(Joiner(), [middle])
    with pytest.raises(ProtocolError, match="inside another"):
        join(Joiner(), [first, first])
    with pytest.raises(ProtocolError, match="inside another"):
        join(Joiner(), [first, *cut(b"m", b"")])


def test_a_message_cannot_end_early_or_run_over() -> None:
    first, middle, last = cut(b"m" * 16, bytes(3 * CHUNK_BYTES - 16))

    with pytest.raises(ProtocolError, match="not the length"):
        join(Joiner(), [first, last])
    with pytest.raises(ProtocolError, match="not the length"):
        join(Joiner(), [first, middle, middle])


def test_announcing_much_costs_nothing_and_too_much_is_refused() -> None:
    joiner = Joiner()
    announce = [header(1, FIRST, stream, 1, MAX_BODY_BYTES // 2, 1) for stream in range(3)]
    before = getrusage(RUSAGE_SELF).ru_minflt

    join(joiner, announce[:2])
    with pytest.raises(ProtocolError, match="no room"):
        join(joiner, announce[2:])

    # 256 MiB would be 65 536 pages.
    assert getrusage(RUSAGE_SELF).ru_minflt - before < 1000


def test_only_so_many_messages_are_half_received_at_once() -> None:
    joiner = Joiner()
    join(joiner, [header(1, FIRST, stream, 1, 10, 1) for stream in range(MAX_OPEN_MESSAGES)])

    with pytest.raises(ProtocolError, match="are open"):
        join(joiner, [header(1, FIRST, MAX_OPEN_MESSAGES, 1, 10, 1)])


def feed(joiner: Joiner, data: bytes) -> None:
    try:
        frame_header = read_header(data)
        if frame_header.kind == PEER_WIRE:
            joiner.push(frame_header, data)
    except ProtocolError:
        pass


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_random_bytes_meet_nothing_but_a_protocol_error(frames: list[bytes]) -> None:
    joiner = Joiner()
    for frame in frames:
        feed(joiner, frame)


@settings(max_examples=300)
@given(st.integers(1, 3 * CHUNK_BYTES), st.data())
def test_altered_frames_meet_nothing_but_a_protocol_error(size: int, data: st.DataObject) -> None:
    frames = cut(b"m", bytes(size))
    joiner = Joiner()
    for _ in range(data.draw(st.integers(1, 8))):
        frame = bytearray(data.draw(st.sampled_from(frames)))
        for _ in range(data.draw(st.integers(0, 4))):
            frame[data.draw(st.integers(0, HEADER_BYTES - 1))] = data.draw(st.integers(0, 255))
        feed(joiner, bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("float32", [], 4), ("bfloat16", [3], 6), ("float16", [2, 3, 4], 48), ("int32", [5, 0], 0)],
)
def test_a_tensor_is_as_long_as_its_type_and_shape_say(dtype: str, shape: list[int], size: int) -> None:
    tensor = Tensor(dtype, shape)  # type: ignore[arg-type]

    assert tensor_bytes(tensor) == size
    check_tensor(tensor, bytes(size))
    with pytest.raises(ProtocolError, match="tensor"):
        check_tensor(tensor, bytes(size + 1))


def test_a_tensor_over_the_cap_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(ProtocolError, match="takes"):
        check_tensor(Tensor("float32", [1 << 31, 1 << 31, 1 << 31]), b"")
