"""The next question of a chat goes where its beginning is kept, unless that costs more than it saves."""

from __future__ import annotations

import pytest

from shared.client import prefix_routes
from shared.client.prefix_routes import PrefixRoutes, worth_it
from shared.client.route_planner import Candidate, plan_route, route_ms
from shared.identity import PeerId
from shared.protocol import PREFIX_PAGE, RouteSpan
from shared.spans import Span

ANN = [RouteSpan("ann", 0, 8)]
EVE = [RouteSpan("eve", 0, 4), RouteSpan("bob", 4, 8)]


def peer(name: str, start: int, end: int, *, room: int = 1000, ms: float = 1.0) -> Candidate:
    return Candidate(peer=PeerId(name), span=Span(start, end), kv_tokens_free=room, ms_per_layer=ms)


def test_the_longest_beginning_counts_and_among_equal_ones_the_last() -> None:
    routes = PrefixRoutes()
    routes.remember(["a", "b", "c"], ANN)
    routes.remember(["a", "b", "d", "e"], EVE)

    assert routes.find(["a", "b", "c", "x"]) == (tuple(ANN), 3 * PREFIX_PAGE)
    assert routes.find(["a", "b", "x"]) == (tuple(EVE), 2 * PREFIX_PAGE)
    assert routes.find(["x", "y"]) == routes.find([]) == ((), 0)


def test_what_was_used_least_recently_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_routes, "MOST", 3)
    routes = PrefixRoutes()
    for text in ("a", "b", "c"):
        routes.remember([text], ANN)
    routes.remember(["a"], EVE)
    routes.remember(["d"], ANN)

    assert [routes.find([text])[1] > 0 for text in ("a", "b", "c", "d")] == [True, False, True, True]


def test_a_route_costs_what_the_planner_thinks_of_it() -> None:
    candidates = [peer("ann", 0, 4), peer("bob", 2, 8), peer("eve", 4, 8, ms=3)]

    def cost(*route: RouteSpan, tokens: int = 10) -> float | None:
        return route_ms(route, candidates, tokens=tokens, salt="s")

    best = plan_route(candidates, Span(0, 8), model="demo", tokens=10, salt="s")
    slower = cost(RouteSpan("ann", 0, 4), RouteSpan("eve", 4, 8))
    cheapest = cost(*best)
    assert slower is not None and cheapest is not None
    assert slower - cheapest == pytest.approx(4 * 2, abs=0.1)
    assert cost(RouteSpan("ann", 0, 5)) is None, "it has not these layers"
    assert cost(RouteSpan("joe", 0, 8)) is None, "it is gone"
    assert cost(*best, tokens=1001) is None, "it has no room"


def test_a_long_beginning_outweighs_a_slower_route_and_a_short_one_does_not() -> None:
    assert worth_it(20.0, 20.0, PREFIX_PAGE, 1000)
    assert worth_it(30.0, 20.0, 4000, 200)
    assert not worth_it(30.0, 20.0, PREFIX_PAGE, 200)
    assert worth_it(15.0, 20.0, PREFIX_PAGE, 1000), "the faster one anyway"
