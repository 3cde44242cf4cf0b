"""Petals' rules, written from their description, to compare with: placement, rebalancing and routing.

A newcomer takes the window whose layers, sorted by throughput, are the smallest; a peer's throughput is
shared evenly over its layers. From time to time a peer simulates everyone choosing anew and moves when the
weakest layer has less than 0.75 of what it could have. Routes are shortest paths over round trips, 18 ms for
each hop and the time to compute, without regard to load; a peer is used to the end of its span.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

import msgspec

from bench.simulation.machines import Machine
from peer.placement import Placed
from shared.client.route_planner import Candidate
from shared.errors import NoRoute
from shared.identity import PeerId
from shared.protocol import RouteSpan
from shared.spans import Span, layer_sums

BALANCE = 0.75
SLACK = 1e-3
HOP_MS = 18.0
SHORT_OF_CACHE_MS = 10_000.0
UNKNOWN_RTT_MS = 150.0


def place_one_by_one(machines: Sequence[Machine], layer_count: int) -> list[Placed]:
    swarm: list[Placed] = []
    for machine in machines:
        span = window(throughput(swarm, layer_count), machine.layers)
        swarm.append(Placed(machine.id, span, machine.speed))
    return swarm


def rebalanced(swarm: Sequence[Placed], layer_count: int, numbers: random.Random) -> list[Placed]:
    """Every peer in turn looks whether to move, until nobody does."""
    now = list(swarm)
    for _ in range(20):
        before = list(now)
        for index in numbers.sample(range(len(now)), len(now)):
            span = other_place(now, index, layer_count, numbers)
            if span is not None:
                now[index] = msgspec.structs.replace(now[index], span=span)
        if now == before:
            break
    return now


def throughput(swarm: Sequence[Placed], layer_count: int) -> list[float]:
    return layer_sums(((each.span, each.speed / len(each.span)) for each in swarm), layer_count)


def window(layers: Sequence[float], length: int) -> Span:
    starts = range(len(layers) - length + 1)
    start = min(starts, key=lambda start: sorted(layers[start : start + length]))
    return Span(start, start + length)


def other_place(swarm: Sequence[Placed], index: int, layer_count: int, numbers: random.Random) -> Span | None:
    """Where a peer moves to; None when it stays."""
    me = swarm[index]
    without = [each for each in swarm if each.peer != me.peer]
    layers = throughput(without, layer_count)
    if min(layers) <= 0:
        return None  # it would disconnect the swarm
    mine = window(layers, len(me.span))
    if mine == me.span:
        return None
    tried = [*without, msgspec.structs.replace(me, span=mine)]
    moved = True
    for _ in range(10):
        if not moved:
            break
        moved = False
        for other in numbers.sample(range(len(tried)), len(tried)):
            each = tried.pop(other)
            span = window(throughput(tried, layer_count), len(each.span))
            moved = moved or span != each.span
            tried.insert(other, msgspec.structs.replace(each, span=span))
    present, possible = min(throughput(swarm, layer_count)), min(throughput(tried, layer_count))
    return mine if present / possible < BALANCE - SLACK else None


def route(candidates: Sequence[Candidate], layer_count: int, tokens: int) -> list[RouteSpan]:
    """Dijkstra over (layers computed, peer)."""
    entering: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        for layer in range(candidate.span.start, candidate.span.end):
            entering.setdefault(layer, []).append(candidate)
    heap: list[tuple[float, int, int, tuple[RouteSpan, ...]]] = [(0.0, 0, 0, ())]
    number = 0
    done: set[int] = set()
    while heap:
        cost, layer, _, taken = heapq.heappop(heap)
        if layer == layer_count:
            return list(taken)
        if layer in done:
            continue
        done.add(layer)
        for candidate in entering.get(layer, ()):
            end = candidate.span.end
            price = _price(candidate, end - layer, tokens)
            entry = RouteSpan(PeerId(candidate.peer), layer, end)
            number += 1
            heapq.heappush(heap, (cost + price, end, number, (*taken, entry)))
    raise NoRoute("no live peer serves some layers")


def _price(candidate: Candidate, layers: int, tokens: int) -> float:
    rtt_ms = candidate.rtt_ms if candidate.rtt_ms is not None else UNKNOWN_RTT_MS
    short = SHORT_OF_CACHE_MS if candidate.kv_tokens_free < tokens else 0.0
    return rtt_ms / 2 + HOP_MS + layers * (candidate.ms_per_layer or 0.0) + short
