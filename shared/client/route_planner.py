"""Choose which peers a token visits. Knows spans and speeds; never opens a connection."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from shared.errors import Busy, NoRoute
from shared.identity import PeerId
from shared.protocol import RouteSpan
from shared.spans import Span, coverage, gaps

HOP_MS = 5.0
"""The price of one more hop when nothing is known of the link: a message, a thread hand-over, a queue."""
BUSY_RETRY_S = 2.0
CROWD = 0.13
"""By how much one more session slows a peer's passes: four in one pass took 1.38 times as long as one."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A peer as the planner sees it."""

    peer: PeerId
    span: Span
    kv_tokens_free: int
    ms_per_layer: float | None = None
    rtt_ms: float | None = None
    sessions: int = 0
    """Sessions that it serves now, as far as known."""
    wait_ms: float = 0.0
    """What a step waits there before it is computed."""


def plan_route(
    candidates: Sequence[Candidate], wanted: Span, *, model: str, tokens: int, salt: str
) -> list[RouteSpan]:
    """The cheapest run of spans that covers `wanted`: few hops, fast peers; each peer at most once.

    `tokens` is the KV room that every hop must have. `salt` (the session's id) spreads sessions over peers
    that cost the same. Raises NoRoute naming the layers nobody serves, or Busy when only room is missing.
    """
    roomy = [candidate for candidate in candidates if candidate.kv_tokens_free >= tokens]
    route = _cheapest(roomy, wanted, salt)
    if route is not None:
        return route
    if _cheapest(candidates, wanted, salt) is not None:
        raise Busy(f"every peer of {model} is full; try again in {BUSY_RETRY_S:.0f} s", BUSY_RETRY_S)
    raise NoRoute(_missing(candidates, wanted, model))


def fill_route(
    survivors: Sequence[RouteSpan],
    candidates: Sequence[Candidate],
    layer_count: int,
    *,
    model: str,
    tokens: int,
    salt: str,
) -> list[RouteSpan]:
    """A whole route that keeps the survivors where possible and fills the rest. Raises like `plan_route`.

    Survivors already hold KV room and caches, so they are kept first; only when the gaps between them
    cannot be filled by other peers is the route planned anew.
    """
    kept = {span.peer for span in survivors}
    others = [candidate for candidate in candidates if candidate.peer not in kept]
    route = list(survivors)
    try:
        for gap in gaps(coverage((Span(span.start, span.end) for span in survivors), layer_count)):
            used = {span.peer for span in route}
            free = [candidate for candidate in others if candidate.peer not in used]
            route += plan_route(free, gap, model=model, tokens=tokens, salt=salt)
    except (NoRoute, Busy):
        if not survivors:
            raise
        return plan_route(candidates, Span(0, layer_count), model=model, tokens=tokens, salt=salt)
    return sorted(route, key=lambda span: span.start)


def route_ms(
    route: Sequence[RouteSpan], candidates: Sequence[Candidate], *, tokens: int, salt: str
) -> float | None:
    """What a token takes on a given route; None when one of its peers is gone, lacks layers or is full."""
    pace = _typical_pace(candidates)
    at_hand = {candidate.peer: candidate for candidate in candidates if candidate.kv_tokens_free >= tokens}
    total = 0.0
    for span in route:
        candidate = at_hand.get(PeerId(span.peer))
        if candidate is None or not candidate.span.start <= span.start < span.end <= candidate.span.end:
            return None
        total += _cost(candidate, span.end - span.start, pace, salt)
    return total


def _cheapest(candidates: Sequence[Candidate], wanted: Span, salt: str) -> list[RouteSpan] | None:
    """Dynamic programming over span edges: the best way to have computed every layer before an edge."""
    pace = _typical_pace(candidates)
    edges = sorted({wanted.start, wanted.end, *_inner_edges(candidates, wanted)})
    best: dict[int, tuple[float, list[RouteSpan]]] = {wanted.start: (0.0, [])}
    for start in edges:
        if start not in best:
            continue
        cost_here, route = best[start]
        for candidate in candidates:
            if not candidate.span.start <= start < candidate.span.end or _visits(route, candidate.peer):
                continue
            for end in (edge for edge in edges if start < edge <= candidate.span.end):
                cost = cost_here + _cost(candidate, end - start, pace, salt)
                if end not in best or cost < best[end][0]:
                    best[end] = (cost, [*route, RouteSpan(candidate.peer, start, end)])
    return best[wanted.end][1] if wanted.end in best else None


def _cost(candidate: Candidate, layers: int, pace: float, salt: str) -> float:
    per_layer = candidate.ms_per_layer if candidate.ms_per_layer is not None else pace
    # An unknown round trip is unknown, not zero: it costs what a hop usually costs.
    link = candidate.rtt_ms / 2 if candidate.rtt_ms is not None else HOP_MS
    # What was measured already holds some of the crowd. Counting it twice only spreads sessions more.
    crowded = per_layer * (1 + CROWD * candidate.sessions)
    return HOP_MS + link + candidate.wait_ms + layers * crowded + _tie_break(candidate.peer, salt)


def _typical_pace(candidates: Sequence[Candidate]) -> float:
    known = [candidate.ms_per_layer for candidate in candidates if candidate.ms_per_layer is not None]
    return median(known) if known else 1.0


def _tie_break(peer: PeerId, salt: str) -> float:
    """Under a hundredth of a millisecond, other for every session: equal peers share the sessions."""
    digest = hashlib.blake2b(f"{salt}{peer}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") / 65536 / 100


def _inner_edges(candidates: Iterable[Candidate], wanted: Span) -> set[int]:
    edges = {edge for candidate in candidates for edge in (candidate.span.start, candidate.span.end)}
    return {edge for edge in edges if wanted.start < edge < wanted.end}


def _visits(route: Sequence[RouteSpan], peer: PeerId) -> bool:
    return any(span.peer == peer for span in route)


def _missing(candidates: Sequence[Candidate], wanted: Span, model: str) -> str:
    counts = coverage((candidate.span for candidate in candidates), wanted.end)
    missing = gaps([1] * wanted.start + counts[wanted.start :])
    layers = " and ".join(str(gap) for gap in missing) or str(wanted)
    return f"no live peer serves layers {layers} of {model}"
