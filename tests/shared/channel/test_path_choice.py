"""Which of several links is taken, and how much may be under way on it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.channel.link import LinkKind
from shared.channel.path_choice import (
    TURN_S,
    WINDOW_LEAST_BYTES,
    WINDOW_MOST_BYTES,
    WINDOW_START_BYTES,
    Way,
    choose,
    window_bytes,
)

KINDS: list[LinkKind] = ["relayed", "data channel", "socket"]
MEGABYTE = 1_000_000.0


def way(
    kind: LinkKind, rtt_ms: float | None = None, goodput: float | None = None, trusted: bool = True
) -> Way:
    return Way(kind, trusted, rtt_ms, goodput)


def taken(*ways: Way, current: int | None = None, settled: bool = True) -> LinkKind | None:
    chosen = choose(ways, current, settled=settled)
    return None if chosen is None else ways[chosen].kind


anything = st.lists(
    st.builds(
        Way,
        st.sampled_from(KINDS),
        st.booleans(),
        st.none() | st.floats(0.01, 2000),
        st.none() | st.floats(1e3, 1e9),
    ),
    max_size=5,
)


def test_of_links_alike_the_most_direct_is_taken() -> None:
    relay, channel, socket = way("relayed", 20), way("data channel", 20), way("socket", 20)

    assert taken(relay) == "relayed"
    assert taken(relay, channel, current=0, settled=False) == "data channel"
    assert taken(relay, channel, socket, current=1, settled=False) == "socket"
    assert taken() is None


def test_a_direct_link_is_taken_although_the_relay_is_a_little_faster() -> None:
    assert taken(way("relayed", 10), way("data channel", 16), current=0) == "data channel"
    assert taken(way("relayed", 100), way("data channel", 124), current=0) == "data channel"


def test_a_direct_link_that_is_clearly_slower_is_not_taken() -> None:
    assert taken(way("relayed", 10), way("data channel", 60), current=0) == "relayed"
    assert taken(way("relayed", 10, 20 * MEGABYTE), way("socket", 10, MEGABYTE / 10), current=0) == "relayed"


def test_a_direct_link_in_use_is_left_only_for_one_that_is_much_faster_and_not_at_once() -> None:
    relay = way("relayed", 10)

    assert taken(relay, way("data channel", 20), current=1) == "data channel"
    assert taken(relay, way("data channel", 60), current=1, settled=False) == "data channel"
    assert taken(relay, way("data channel", 60), current=1) == "relayed"


def test_a_goodput_that_nobody_measured_decides_nothing() -> None:
    assert taken(way("relayed", 10), way("data channel", 10, MEGABYTE / 10), current=1) == "data channel"


def test_a_link_that_may_lead_nowhere_is_left_whatever_its_figures() -> None:
    gone = way("socket", 1, 100 * MEGABYTE, trusted=False)

    assert taken(way("relayed", 300), gone, current=1, settled=False) == "relayed"
    assert taken(way("relayed", trusted=False), gone, current=1) == "relayed"
    assert taken(gone) == "socket"


@given(anything, st.integers(0, 4), st.booleans())
def test_what_was_chosen_is_chosen_again(ways: list[Way], current: int, settled: bool) -> None:
    first = choose(ways, current if current < len(ways) else None, settled=settled)

    assert (first is None) == (not ways)
    for calm in (True, False):
        again = choose(ways, first, settled=settled or calm)
        assert choose(ways, again, settled=calm) == again
    if first is not None:
        assert ways[first].trusted or not any(each.trusted for each in ways)


@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.floats(0.1, 500), st.floats(0.9, 1.1), st.data())
def test_two_paths_whose_times_tremble_do_not_alternate(
    one: LinkKind, other: LinkKind, rtt_ms: float, ratio: float, data: st.DataObject
) -> None:
    current: int | None = None
    changes = 0
    for _ in range(30):
        tremble = [data.draw(st.floats(0.95, 1.05)) for _ in range(2)]
        ways = [way(one, rtt_ms * tremble[0]), way(other, rtt_ms * ratio * tremble[1])]
        chosen = choose(ways, current, settled=True)
        changes += chosen != current
        current = chosen
    assert changes <= 2


@given(st.floats(1e3, 1e9), st.floats(0.01, 1000))
def test_the_window_keeps_the_path_full_and_little_more(goodput: float, rtt_ms: float) -> None:
    window = window_bytes(way("socket", rtt_ms, goodput))
    on_the_way = goodput * rtt_ms / 1000

    assert WINDOW_LEAST_BYTES <= window <= WINDOW_MOST_BYTES
    assert window >= min(on_the_way, WINDOW_MOST_BYTES - 1)
    assert window_bytes(way("relayed", rtt_ms, goodput)) == min(window, WINDOW_START_BYTES)
    if window > WINDOW_LEAST_BYTES:
        assert window / goodput <= 1.5 * rtt_ms / 1000 + TURN_S + 0.0001


@pytest.mark.parametrize("known", [(None, 10.0), (1e6, None), (None, None)])
def test_a_path_that_was_not_measured_begins_with_half_a_megabyte(
    known: tuple[float | None, float | None],
) -> None:
    goodput, rtt_ms = known
    assert window_bytes(way("data channel", rtt_ms, goodput)) == WINDOW_START_BYTES == 512 * 1024
