"""When a step is late, and how often that may be acted on."""

from __future__ import annotations

from shared.client.lateness import ENOUGH, EVERY, FLOOR_S, Lateness


def usual(seconds: float, steps: int = 2 * ENOUGH) -> Lateness:
    lateness = Lateness()
    for _ in range(steps):
        lateness.took(seconds)
    return lateness


def test_nothing_is_late_before_it_is_known_what_is_usual() -> None:
    assert usual(1.0, ENOUGH - 1).limit_s is None
    assert usual(1.0, ENOUGH).limit_s == 2.0


def test_twice_what_nearly_all_steps_took_is_late() -> None:
    lateness = usual(0.4, 39)
    lateness.took(9.0)
    assert lateness.limit_s == 0.8, "one in forty tells nothing"
    for _ in range(4):
        lateness.took(1.0)
    assert lateness.limit_s == 2.0


def test_quick_steps_have_a_floor() -> None:
    assert usual(0.01).limit_s == FLOOR_S


def test_only_the_last_steps_tell_what_is_usual() -> None:
    lateness = usual(5.0, 100)
    for _ in range(64):
        lateness.took(1.0)
    assert lateness.limit_s == 2.0


def test_a_hedge_has_to_be_paid_for_by_steps() -> None:
    lateness = usual(1.0)
    lateness.spend()
    allowed = 0
    for _ in range(2 * EVERY):
        lateness.took(1.0)
        if lateness.limit_s is not None:
            allowed += 1
            lateness.spend()
    assert allowed == 2


def test_after_hedges_in_vain_a_step_must_be_later() -> None:
    lateness = usual(1.0)
    lateness.in_vain()
    assert lateness.limit_s == 4.0
    for _ in range(9):
        lateness.in_vain()
    assert lateness.limit_s == 16.0
