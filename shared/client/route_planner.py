"""Choose which peers a token visits. Knows spans and speeds; never opens a connection."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from types import MappingProxyType

import msgspec

from shared.errors import Busy, NoRoute
from shared.identity import PeerId
from shared.protocol import RouteSpan
from shared.spans import Span, coverage, gaps

HOP_MS = 5.0
"""The price of one more hop when nothing is known of the link: a message, a thread hand-over, a queue."""
BUSY_RETRY_S = 2.0
SHORTLIST = 8
"""Of many candidates, so many of the cheapest for each layer are looked at closely."""
MANY = 64
WAIT = 4.0
"""A step that waits makes those behind it wait too, so a queue costs others more than the one who joins it.
In simulations with 128 and 512 sessions, 4 carried most."""
PATIENCE = 16
"""A pause for a replay weighs as much as the same time spread over so many tokens."""
SPREAD = 3.0
"""By up to so many times its length a replay counts as longer, by chance, where more than one session runs:
askers that lose one peer at the same moment, and know nothing of each other, would else meet again."""
NOTHING_HELD: Mapping[PeerId, int] = MappingProxyType({})
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
    replays: Sequence[int] = ()
    """Sessions that have just gone there: how many positions it has to compute for each."""


def plan_route(
    candidates: Sequence[Candidate],
    wanted: Span,
    *,
    model: str,
    tokens: int,
    salt: str,
    replay: int = 0,
    held: Mapping[PeerId, int] = NOTHING_HELD,
) -> list[RouteSpan]:
    """The cheapest run of spans that covers `wanted`: few hops, fast peers; each peer at most once.

    `replay` is how many positions a peer has to catch up with before the session goes on, less those that it
    holds already by `held`; such a peer has room. `tokens` is the KV room that every other one must have.
    `salt` (the session's id) spreads sessions over peers that cost the same.
    Raises NoRoute naming the layers nobody serves, or Busy when only room is missing.
    """
    missing = {peer: max(0, replay - positions) for peer, positions in held.items()}
    roomy = [each for each in candidates if each.kv_tokens_free >= tokens or each.peer in held]
    route = _cheapest(roomy, wanted, salt, replay, missing)
    if route is not None:
        return route
    if _cheapest(candidates, wanted, salt, replay, missing) is not None:
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
    replay: int = 0,
    held: Mapping[PeerId, int] = NOTHING_HELD,
) -> list[RouteSpan]:
    """A whole route that keeps the survivors where possible and fills the rest. Raises like `plan_route`.

    Survivors already hold KV room and caches, so they are kept first; only when the gaps between them
    cannot be filled by other peers is the route planned anew.
    """
    plan = partial(plan_route, model=model, tokens=tokens, salt=salt, replay=replay, held=held)
    kept = {span.peer for span in survivors}
    others = [candidate for candidate in candidates if candidate.peer not in kept]
    route = list(survivors)
    try:
        for gap in gaps(coverage((Span(span.start, span.end) for span in survivors), layer_count)):
            used = {span.peer for span in route}
            free = [candidate for candidate in others if candidate.peer not in used]
            route += plan(free, gap)
    except (NoRoute, Busy):
        if not survivors:
            raise
        return plan(candidates, Span(0, layer_count))
    return sorted(route, key=lambda span: span.start)


def route_ms(
    route: Sequence[RouteSpan], candidates: Sequence[Candidate], *, tokens: int, salt: str
) -> float | None:
    """What a token takes on a given route; None when one of its peers is gone, lacks layers or is full."""
    prices = dict(zip((each.peer for each in candidates), _prices(candidates, salt, 0, {}), strict=True))
    at_hand = {candidate.peer: candidate for candidate in candidates if candidate.kv_tokens_free >= tokens}
    total = 0.0
    for span in route:
        candidate = at_hand.get(PeerId(span.peer))
        if candidate is None or not candidate.span.start <= span.start < span.end <= candidate.span.end:
            return None
        fixed, each_layer = prices[candidate.peer]
        total += fixed + (span.end - span.start) * each_layer
    return total


def _cheapest(
    candidates: Sequence[Candidate],
    wanted: Span,
    salt: str,
    replay: int,
    missing: Mapping[PeerId, int],
) -> list[RouteSpan] | None:
    """Dynamic programming over layers: the best way to have computed every layer before one.

    At each layer a candidate either goes on or is entered from the best way so far, so the work is one
    comparison for each layer that a candidate holds.
    """
    prices = _prices(candidates, salt, replay, missing)
    if len(candidates) > MANY:
        kept = _shortlist(candidates, prices, wanted)
        candidates, prices = [candidates[index] for index in kept], [prices[index] for index in kept]
    entering = _entering(candidates, wanted)
    best = {wanted.start: 0.0}
    last: dict[int, tuple[int, int]] = {}
    """For each layer reached: the candidate that computed the one before, and where its run began."""
    running: dict[int, tuple[float, int]] = {}
    for layer in range(wanted.start, wanted.end):
        for index in entering.get(layer, ()):
            running[index] = math.inf, layer
        here, cheapest, found = best.get(layer, math.inf), math.inf, None
        for index, (cost, begin) in list(running.items()):
            fixed, each_layer = prices[index]
            if here + fixed < cost:
                cost, begin = here + fixed, layer
            cost += each_layer
            if cost < cheapest:
                cheapest, found = cost, (index, begin)
            if candidates[index].span.end > layer + 1:
                running[index] = cost, begin
            else:
                del running[index]
        if found is None or cheapest == math.inf:
            return None
        best[layer + 1], last[layer + 1] = cheapest, found
    return _backwards(candidates, wanted, last)


def _shortlist(
    candidates: Sequence[Candidate], prices: Sequence[tuple[float, float]], wanted: Span
) -> list[int]:
    """The cheapest by what a layer costs there, hop included, so that every layer has some."""
    lengths = [len(candidate.span) for candidate in candidates]
    order = sorted(
        range(len(candidates)), key=lambda index: prices[index][0] / lengths[index] + prices[index][1]
    )
    lacking = dict.fromkeys(range(wanted.start, wanted.end), SHORTLIST)
    kept = []
    for index in order:
        span = candidates[index].span
        held = [layer for layer in range(span.start, span.end) if lacking.get(layer, 0) > 0]
        if held:
            kept.append(index)
        for layer in held:
            lacking[layer] -= 1
    return kept


def _entering(candidates: Sequence[Candidate], wanted: Span) -> dict[int, list[int]]:
    """The candidates by the first wanted layer that each holds."""
    entering: dict[int, list[int]] = {}
    for index, candidate in enumerate(candidates):
        first = max(candidate.span.start, wanted.start)
        if first < min(candidate.span.end, wanted.end):
            entering.setdefault(first, []).append(index)
    return entering


def _backwards(
    candidates: Sequence[Candidate], wanted: Span, last: dict[int, tuple[int, int]]
) -> list[RouteSpan]:
    route: list[RouteSpan] = []
    reached = wanted.end
    while reached > wanted.start:
        index, begin = last[reached]
        route.insert(0, RouteSpan(candidates[index].peer, begin, reached))
        reached = begin
    return _each_once(route)


def _each_once(route: Sequence[RouteSpan]) -> list[RouteSpan]:
    """A peer visited twice holds what lies between as well, and computes that too."""
    kept: list[RouteSpan] = []
    for span in route:
        twice = next((index for index, other in enumerate(kept) if other.peer == span.peer), None)
        if twice is None:
            kept.append(span)
        else:
            kept[twice:] = [RouteSpan(span.peer, kept[twice].start, span.end)]
    return kept


def _prices(
    candidates: Sequence[Candidate], salt: str, replay: int, missing: Mapping[PeerId, int]
) -> list[tuple[float, float]]:
    """Milliseconds that each candidate costs: for visiting it at all, and for each layer.

    It replays what it lacks by `missing`, or all of it.
    """
    pace = usual([candidate.ms_per_layer for candidate in candidates], 1.0)
    # An unknown round trip is unknown, not zero: it costs what a hop usually costs.
    link = usual([candidate.rtt_ms for candidate in candidates], 2 * HOP_MS) / 2
    prices = [_price(candidate, pace, link, salt) for candidate in candidates]
    spread = SPREAD if any(candidate.sessions > 1 for candidate in candidates) else 0.0
    passes = [
        1 + _replayed(candidate, missing.get(candidate.peer, replay), spread, salt) / PATIENCE
        for candidate in candidates
    ]
    return [(fixed, count * each_layer) for (fixed, each_layer), count in zip(prices, passes, strict=True)]


def _replayed(candidate: Candidate, positions: int, spread: float, salt: str) -> float:
    """How many positions go through a peer until it has caught up with so many: replays take turns."""
    shared = positions + sum(min(positions, other) for other in candidate.replays)
    return shared * (1 + spread * _chance(candidate.peer, salt)) if shared else 0.0


def _price(candidate: Candidate, pace: float, usual_link: float, salt: str) -> tuple[float, float]:
    link = candidate.rtt_ms / 2 if candidate.rtt_ms is not None else usual_link
    per_layer = candidate.ms_per_layer if candidate.ms_per_layer is not None else pace
    # What was measured already holds some of the crowd. Counting it twice only spreads sessions more.
    crowded = per_layer * (1 + CROWD * candidate.sessions)
    return HOP_MS + link + WAIT * candidate.wait_ms + _tie_break(candidate.peer, salt), crowded


def usual(values: Iterable[float | None], otherwise: float) -> float:
    """The middle one of those that are known."""
    known = [value for value in values if value is not None]
    return median(known) if known else otherwise


def _tie_break(peer: PeerId, salt: str) -> float:
    """Under a hundredth of a millisecond, other for every session: equal peers share the sessions."""
    return _chance(peer, salt) / 100


def _chance(peer: PeerId, salt: str) -> float:
    """From 0 to 1, other for every session."""
    digest = hashlib.blake2b(f"{salt}{peer}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") / 65536


def _missing(candidates: Sequence[Candidate], wanted: Span, model: str) -> str:
    counts = coverage((candidate.span for candidate in candidates), wanted.end)
    missing = gaps([1] * wanted.start + counts[wanted.start :])
    layers = " and ".join(str(gap) for gap in missing) or str(wanted)
    return f"no live peer serves layers {layers} of {model}"
