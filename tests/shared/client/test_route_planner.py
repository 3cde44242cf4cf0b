"""A route covers every layer once, in few hops, on peers that have room."""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from shared.client.route_planner import Candidate, fill_route, plan_route
from shared.client.standbys import choose_standby
from shared.errors import Busy, NoRoute
from shared.identity import PeerId
from shared.protocol import RouteSpan
from shared.spans import Span


def peer(name: str, start: int, end: int, *, room: int = 1000, ms: float | None = 1.0) -> Candidate:
    return Candidate(peer=PeerId(name), span=Span(start, end), kv_tokens_free=room, ms_per_layer=ms)


def plan(candidates: list[Candidate], layers: int, tokens: int = 10) -> list[tuple[str, int, int]]:
    route = plan_route(candidates, Span(0, layers), model="demo", tokens=tokens, salt="s")
    return [(span.peer, span.start, span.end) for span in route]


def test_one_peer_with_all_layers_is_the_whole_route() -> None:
    assert plan([peer("ann", 0, 4), peer("bob", 4, 8), peer("eve", 0, 8)], 8) == [("eve", 0, 8)]


def test_a_much_faster_pair_beats_one_slow_peer() -> None:
    assert plan([peer("ann", 0, 4), peer("bob", 4, 8), peer("eve", 0, 8, ms=50)], 8) == [
        ("ann", 0, 4),
        ("bob", 4, 8),
    ]


def test_overlapping_spans_are_cut_where_they_meet() -> None:
    assert plan([peer("ann", 0, 5), peer("bob", 3, 8)], 8) in (
        [("ann", 0, 5), ("bob", 5, 8)],
        [("ann", 0, 3), ("bob", 3, 8)],
    )


def test_missing_layers_are_named() -> None:
    with pytest.raises(NoRoute, match="no live peer serves layers 4–6 of demo"):
        plan([peer("ann", 0, 4), peer("bob", 6, 8)], 8)


def test_a_full_peer_is_passed_by_and_a_full_swarm_is_busy() -> None:
    full = peer("ann", 0, 8, room=5)
    assert plan([full, peer("bob", 0, 8)], 8) == [("bob", 0, 8)]
    with pytest.raises(Busy, match="every peer of demo is full"):
        plan([full], 8)


def test_sessions_spread_over_peers_that_cost_the_same() -> None:
    twins = [peer("ann", 0, 8), peer("bob", 0, 8)]
    first = {
        plan_route(twins, Span(0, 8), model="demo", tokens=1, salt=str(number))[0].peer
        for number in range(40)
    }
    assert first == {"ann", "bob"}


def test_a_gap_is_filled_and_the_survivors_stay() -> None:
    survivors = [RouteSpan("ann", 0, 4), RouteSpan("eve", 6, 8)]
    candidates = [peer("ann", 0, 8), peer("eve", 6, 8), peer("dan", 2, 8)]
    route = fill_route(survivors, candidates, 8, model="demo", tokens=1, salt="s")
    assert route == [survivors[0], RouteSpan("dan", 4, 6), survivors[1]]


def test_when_only_a_survivor_can_fill_the_gap_the_route_is_planned_anew() -> None:
    survivors = [RouteSpan("ann", 0, 4)]
    route = fill_route(survivors, [peer("ann", 0, 8)], 8, model="demo", tokens=1, salt="s")
    assert route == [RouteSpan("ann", 0, 8)]


@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda ends: ends[0] < ends[1]), max_size=8
    )
)
def test_a_route_exists_exactly_when_every_layer_is_held(spans: list[tuple[int, int]]) -> None:
    candidates = [peer(f"p{number}", *span) for number, span in enumerate(spans)]
    held = {layer for start, end in spans for layer in range(start, end)}
    if held != set(range(12)):
        with pytest.raises(NoRoute):
            plan(candidates, 12)
        return
    route = plan(candidates, 12)
    assert [layer for _, start, end in route for layer in range(start, end)] == list(range(12))
    assert len({name for name, _, _ in route}) == len(route)
    holders = {candidate.peer: candidate.span for candidate in candidates}
    assert all(holders[PeerId(name)].holds(Span(start, end)) for name, start, end in route)


# ---------------------------------------------------------------- what a hop costs


def measured(name: str, start: int, end: int, **changes: float) -> Candidate:
    return msgspec.structs.replace(peer(name, start, end), **changes)


def test_an_unknown_round_trip_costs_what_a_known_one_usually_costs() -> None:
    known = [measured(f"far{number}", 0, 8, rtt_ms=80.0) for number in range(3)]
    near, unknown = measured("near", 0, 8, rtt_ms=70.0), peer("unknown", 0, 8)
    assert plan([*known, near, unknown], 8) == [("near", 0, 8)]
    assert plan([*known, measured("far", 0, 8, rtt_ms=90.0), unknown], 8) != [("far", 0, 8)]


def test_a_queue_sends_sessions_to_a_slower_peer_that_is_idle() -> None:
    busy, idle = measured("busy", 0, 8, wait_ms=10.0), peer("idle", 0, 8, ms=4.0)
    assert plan([busy, idle], 8) == [("idle", 0, 8)]
    assert plan([peer("busy", 0, 8), idle], 8) == [("busy", 0, 8)]


def test_sessions_that_a_peer_already_has_count_against_it() -> None:
    crowded = measured("crowded", 0, 8, sessions=20)
    assert plan([crowded, peer("alone", 0, 8, ms=2.0)], 8) == [("alone", 0, 8)]


def test_with_much_to_catch_up_with_a_fast_peer_far_away_is_better_than_a_slow_one_near_by() -> None:
    slow, fast = measured("slow", 0, 8, ms_per_layer=3.0, rtt_ms=2.0), measured("fast", 0, 8, rtt_ms=90.0)

    def chosen(replay: int) -> str:
        route = plan_route([slow, fast], Span(0, 8), model="demo", tokens=10, salt="s", replay=replay)
        return route[0].peer

    assert (chosen(0), chosen(400)) == ("slow", "fast")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32))
def test_of_many_peers_a_few_are_looked_at_and_still_every_layer_is_found(seed: int) -> None:
    numbers = random.Random(seed)
    crowd = []
    for number in range(200):
        start = numbers.randrange(9)
        crowd.append(peer(f"p{number}", start, start + numbers.randint(1, 3), ms=numbers.choice((1.0, 9.0))))
    only = peer("only", 11, 12, ms=50.0)
    held = {layer for each in crowd for layer in range(each.span.start, each.span.end)} | {11}
    if held != set(range(12)):
        return
    route = plan([*crowd, only], 12)
    assert route[-1] == ("only", 11, 12)
    assert [layer for _, start, end in route for layer in range(start, end)] == list(range(12))


# ---------------------------------------------------------------- standbys


def standby(span: tuple[int, int], candidates: list[Candidate], busiest: float = 100.0) -> str | None:
    return choose_standby(RouteSpan("ann", *span), candidates, tokens=10, busiest=busiest)


def test_a_standby_holds_the_whole_span_and_has_room() -> None:
    others = [peer("part", 0, 3), peer("full", 0, 8, room=5), peer("bob", 0, 8)]
    assert standby((0, 4), others) == "bob"
    assert standby((0, 4), others[:2]) is None


def test_a_fast_peer_with_some_sessions_stands_by_rather_than_a_slow_one_with_none() -> None:
    fast = measured("fast", 0, 8, sessions=5)
    assert standby((0, 4), [peer("slow", 0, 8, ms=20.0), fast]) == "fast"


def test_a_peer_that_could_not_keep_up_is_not_asked_to_stand_by() -> None:
    overrun = measured("overrun", 0, 8, ms_per_layer=20.0, sessions=30)
    assert standby((0, 4), [overrun]) is None
    # Where everyone is slow, slow is usual.
    assert standby((0, 4), [peer(name, 0, 8, ms=60.0) for name in ("bob", "eve")]) == "bob"


def test_who_holds_most_of_a_session_needs_not_be_the_fastest() -> None:
    fast = peer("fast", 0, 4, ms=1)
    slow = peer("slow", 0, 4, ms=4, room=0)

    def chosen(held: int) -> str:
        [span] = plan_route(
            [fast, slow], Span(0, 4), model="demo", tokens=10, salt="", replay=400, held={slow.peer: held}
        )
        return span.peer

    # 25 passes' worth of a replay at 1 ms; the other one lacks 1, 5 or 10 passes' worth at 4 ms.
    assert [chosen(400 - lacks) for lacks in (16, 80, 160)] == ["slow", "slow", "fast"]


# ---------------------------------------------------------------- many that lose the same peer

PACES = {"one": 1.0, "more": 1.2, "half": 1.5, "ten": 10.0}


def heirs(candidates: list[Candidate], sessions: int) -> Counter[str]:
    """Where sessions of as many askers go on that lost a peer at the same moment."""
    return Counter(
        plan_route(candidates, Span(0, 8), model="demo", tokens=10, salt=str(number), replay=200)[0].peer
        for number in range(sessions)
    )


def test_askers_that_know_nothing_of_each_other_do_not_all_choose_the_same_heir() -> None:
    heir = {name: measured(name, 0, 8, ms_per_layer=pace, sessions=4) for name, pace in PACES.items()}
    taken = heirs(list(heir.values()), 100)
    assert len(taken) == 3
    assert max(taken.values()) < 80
    assert taken["ten"] == 0  # chance makes nobody wait for the slowest


def test_where_peers_have_few_sessions_the_fastest_heir_is_taken() -> None:
    assert heirs([measured(name, 0, 8, ms_per_layer=pace) for name, pace in PACES.items()], 20) == {"one": 20}


def test_replays_take_turns_so_a_peer_that_has_some_already_is_dearer() -> None:
    waits = msgspec.structs.replace(peer("fast", 0, 8), replays=(300, 500))
    assert heirs([waits, peer("slow", 0, 8, ms=2.5)], 1) == {"slow": 1}
    # Two that are almost done are no reason to go elsewhere.
    almost = msgspec.structs.replace(waits, replays=(5, 5))
    assert heirs([almost, peer("slow", 0, 8, ms=2.5)], 1) == {"fast": 1}
