"""A route covers every layer once, in few hops, on peers that have room."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from shared.client.route_planner import Candidate, fill_route, plan_route
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
