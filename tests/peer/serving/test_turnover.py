"""When running sessions will have made room."""

from __future__ import annotations

from peer.serving.turnover import LATEST_S, SOONEST_S, Tenant, room_after_s


def tenant(*, held: int = 100, drawn: int = 10, left: int = 20, age_s: float = 2.0) -> Tenant:
    return Tenant(held_bytes=held, drawn=drawn, left=left, age_s=age_s)


def test_a_session_ends_when_it_has_drawn_the_rest_at_its_pace() -> None:
    assert room_after_s([tenant()], 100) == 4.0


def test_the_first_to_end_counts_when_it_frees_enough_and_the_next_when_not() -> None:
    soon, late = tenant(held=60), tenant(held=60, left=50)
    assert room_after_s([late, soon], 60) == 4.0
    assert room_after_s([late, soon], 61) == 10.0


def test_what_nobody_knows_takes_as_long_as_anyone_is_ever_told() -> None:
    assert room_after_s([tenant(drawn=0)], 100) == LATEST_S
    assert room_after_s([tenant(left=10_000)], 100) == LATEST_S
    assert room_after_s([tenant()], 101) == LATEST_S
    assert room_after_s([], 1) == LATEST_S


def test_nobody_is_told_to_come_back_at_once() -> None:
    assert room_after_s([tenant(left=0)], 100) == SOONEST_S
