"""The log holds what was sent on, and forgets what was taken back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from peer.serving.input_log import InputLog

ROW = 3


def rows(*numbers: int) -> bytes:
    return b"".join(bytes([number]) * ROW for number in numbers)


def test_rows_are_read_by_position() -> None:
    log = InputLog(ROW)
    log.write(0, rows(1, 2, 3))
    log.write(3, rows(4))

    assert len(log) == 4
    assert log.read(1, 3) == rows(2, 3)
    assert log.read(3, 9) == rows(4)


def test_writing_earlier_forgets_what_came_after() -> None:
    log = InputLog(ROW)
    log.write(0, rows(1, 2, 3, 4, 5))

    log.write(2, rows(9))

    assert len(log) == 3
    assert log.read(0, 5) == rows(1, 2, 9)


@settings(deadline=None)
@given(writes=st.lists(st.tuples(st.floats(0, 1), st.lists(st.integers(0, 255), max_size=6)), max_size=20))
def test_any_writes_equal_a_list_that_is_cut_and_extended(writes: list[tuple[float, list[int]]]) -> None:
    log, held = InputLog(ROW), list[int]()
    for share, numbers in writes:
        position = round(share * len(held))
        log.write(position, rows(*numbers))
        held[position:] = numbers
        assert len(log) == len(held)
        assert log.read(0, len(held)) == rows(*held)
