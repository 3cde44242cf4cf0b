"""How much may be on its way, told by values and a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.channel.fast.chunks import PAYLOAD_BYTES
from shared.channel.fast.congestion import (
    FIRST_TIMEOUT_S,
    INITIAL_WINDOW_BYTES,
    LEAST_TIMEOUT_S,
    LEAST_WINDOW_BYTES,
    MOST_TIMEOUT_S,
    Congestion,
    RoundTrips,
)

MOST_BYTES = 1 << 20
TRIP_S = 0.025


def warmed(trip_s: float = TRIP_S, rounds: int = 0) -> Congestion:
    """One that has measured a steady round trip, and filled its window for so many of them."""
    congestion = Congestion(MOST_BYTES)
    for number in range(rounds + 1):
        congestion.trips.measured(trip_s, number * trip_s)
        if number:
            congestion.acknowledged(congestion.window_bytes, number * trip_s, held_back=True)
    return congestion


def test_a_decode_message_leaves_at_once() -> None:
    assert Congestion(MOST_BYTES).window_bytes >= 16 * 1024 + PAYLOAD_BYTES


def test_a_window_that_is_filled_doubles_each_round_trip() -> None:
    assert warmed(rounds=3).window_bytes == 8 * INITIAL_WINDOW_BYTES


def test_a_window_that_is_not_filled_stays() -> None:
    congestion = warmed()
    congestion.acknowledged(INITIAL_WINDOW_BYTES, 1.0, held_back=False)

    assert congestion.window_bytes == INITIAL_WINDOW_BYTES


def test_slow_start_ends_when_a_queue_is_felt() -> None:
    congestion = warmed(rounds=2)
    before = congestion.window_bytes
    for number in range(8):
        congestion.trips.measured(TRIP_S * 2, 1.0 + number / 1000)
    congestion.acknowledged(before, 1.1, held_back=True)

    assert not congestion.slow_start
    assert congestion.window_bytes == before + PAYLOAD_BYTES


def test_one_late_answer_is_no_queue() -> None:
    trips = RoundTrips()
    for number in range(8):
        trips.measured(TRIP_S, number * TRIP_S)
    trips.measured(TRIP_S * 10, 1.0)

    assert not trips.queue_felt


def test_a_loss_by_chance_falls_back_to_what_the_path_delivers_not_to_half() -> None:
    congestion = warmed(rounds=4)
    before = congestion.window_bytes
    for number in range(5, 10):
        congestion.acknowledged(before, number * TRIP_S, held_back=False)
    congestion.lost(PAYLOAD_BYTES)
    congestion.slow_down()

    assert before / 2 < congestion.window_bytes <= before
    assert not congestion.slow_start


def test_losing_a_large_share_is_no_chance() -> None:
    congestion = warmed(rounds=4)
    before = congestion.window_bytes
    congestion.lost(before)
    congestion.slow_down()

    assert congestion.window_bytes <= 0.7 * before


def test_after_silence_it_starts_anew_up_to_where_a_loss_would_have_led() -> None:
    congestion = warmed(rounds=4)
    congestion.timed_out()

    assert congestion.window_bytes == LEAST_WINDOW_BYTES
    assert congestion.slow_start


def test_timeouts_stay_within_their_bounds() -> None:
    trips = RoundTrips()
    assert trips.timeout_s == FIRST_TIMEOUT_S
    for number in range(100):
        trips.measured(0.0001, number / 1000)
    assert trips.timeout_s == LEAST_TIMEOUT_S
    for number in range(100):
        trips.measured(60.0, 1.0 + number / 1000)
    assert trips.timeout_s == MOST_TIMEOUT_S


def test_the_least_round_trip_is_forgotten_when_the_path_has_changed() -> None:
    trips = RoundTrips()
    trips.measured(0.01, 0.0)
    trips.measured(0.05, 5.0)
    assert trips.least_s == 0.01
    trips.measured(0.05, 11.0)
    assert trips.least_s == 0.05


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("trip"), st.floats(0.0, 5.0)),
        st.tuples(st.just("acknowledged"), st.integers(1, MOST_BYTES)),
        st.tuples(st.just("lost"), st.integers(1, MOST_BYTES)),
        st.tuples(st.just("timed out"), st.just(0)),
        st.tuples(st.just("pause"), st.floats(0.0, 20.0)),
    ),
    max_size=60,
)


@given(EVENTS, st.sampled_from([256 * 1024, MOST_BYTES]))
def test_whatever_happens_the_window_stays_within_its_bounds(
    events: list[tuple[str, float]], most_bytes: int
) -> None:
    congestion = Congestion(most_bytes)
    now = 0.0
    for what, value in events:
        now += 0.001
        match what:
            case "trip":
                congestion.trips.measured(value, now)
            case "acknowledged":
                congestion.acknowledged(int(value), now, held_back=True)
            case "lost":
                congestion.lost(int(value))
                congestion.slow_down()
            case "timed out":
                congestion.timed_out()
            case _:
                now += value
        assert LEAST_WINDOW_BYTES <= congestion.window_bytes <= most_bytes
        assert LEAST_TIMEOUT_S <= congestion.trips.timeout_s <= MOST_TIMEOUT_S
        assert congestion.trips.probe_s > 0


@pytest.mark.parametrize("most_bytes", [LEAST_WINDOW_BYTES, 10_000])
def test_a_small_socket_buffer_bounds_even_the_first_window(most_bytes: int) -> None:
    assert Congestion(most_bytes).window_bytes == most_bytes
