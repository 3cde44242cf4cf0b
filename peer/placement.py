"""Choose which layers a peer holds, and whether it should hold others. Values only: no network, no weights.

A newcomer takes the span that helps most: first every layer shall have two peers, then the weakest layer
shall carry more, then spans shall end where others end, so that routes have few hops. A peer that serves
moves when that helps enough to be worth its loading, never when a layer would lose its last peer, only while
nobody near it is on the move, and once: then it stays until somebody joins or leaves, so every swarm settles.

Speeds are in layer-tokens per second: how many positions a peer takes through one layer. Whatever the
arrangement, a swarm carries at most the sum of its speeds over the number of its layers.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from functools import lru_cache
from statistics import median
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.identity import PeerId
from shared.protocol import Announcement
from shared.spans import Span, coverage

DRAIN_S = 20.0
"""How long a peer that leaves lets its sessions finish; after that their askers re-route."""
PROPAGATION_S = 1.0
"""After that time others have heard an announcement: two that chose at once see each other."""
RECONSIDER_S = 120.0
"""How often a peer looks whether other layers would help more: half to one and a half times this."""

COPIES = 2
"""Peers that every layer shall have before throughput counts: with one, its leaving stops the swarm."""
KEEP = 0.9
"""A move must leave the present throughput at less than this part of the new one. Petals asks for 0.75; its
rule leaves a sixth of a small swarm's throughput unused, and with one mover at a time less is safe."""
SMALL_SWARM = 32
"""Up to so many peers, whole arrangements are searched, in which several peers move."""
TRIES = 200
"""Arrangements that a search looks at: 0.3 s for twelve peers, once in some minutes."""


class Placed(msgspec.Struct, frozen=True):
    """A peer as placement sees it."""

    peer: PeerId
    span: Span
    speed: float
    state: Literal["joining", "serving", "draining"] = "serving"
    """One that joins counts with the layers that it will hold; one that drains leaves or moves."""
    movable: bool = True
    """False when its owner told it which layers to hold, or it moved since anyone joined or left."""


class Choice(msgspec.Struct, frozen=True):
    """A span to take, and why, in words for a line."""

    span: Span
    why: str


# ---------------------------------------------------------------- what is given


def placed(announcements: Sequence[Announcement]) -> list[Placed]:
    """Peers as they announce themselves. Unknown speeds count as usual ones."""
    usual = usual_speed([each.throughput for each in announcements])
    return [
        Placed(
            PeerId(each.peer), Span(each.start, each.end), each.throughput or usual, each.state, each.movable
        )
        for each in announcements
        if each.state != "left"
    ]


def usual_speed(speeds: Sequence[float | None]) -> float:
    """What is assumed of a peer that has not measured itself yet."""
    known = [speed for speed in speeds if speed]
    return median(known) if known else 1.0


def spans_that_fit(
    layer_bytes: Sequence[int], first_bytes: int, last_bytes: int, memory_bytes: int
) -> list[Span]:
    """From every first layer the longest span that fits. The ends of the model need memory too."""
    count = len(layer_bytes)
    spans: list[Span] = []
    for start in range(count):
        used = first_bytes if start == 0 else 0
        end = start
        while end < count:
            used += layer_bytes[end] + (last_bytes if end == count - 1 else 0)
            if used > memory_bytes:
                break
            end += 1
        # A span inside the one before is no better in anything.
        if end > start and (not spans or end > spans[-1].end):
            spans.append(Span(start, end))
    return spans


def spans_of_length(length: int, layer_count: int) -> list[Span]:
    """Every place for so many layers."""
    length = min(length, layer_count)
    return [Span(start, start + length) for start in range(layer_count - length + 1)]


# ---------------------------------------------------------------- joining


def choose_span(others: Sequence[Placed], options: Sequence[Span], speed: float, layer_count: int) -> Choice:
    """The best of the spans that a newcomer could hold."""
    others = _staying(others)
    chosen = _Layers(others, layer_count).best(options, speed)
    if len(chosen) == layer_count:
        return Choice(chosen, "all layers fit")
    return Choice(chosen, _why(others, chosen, layer_count))


def yields(me: PeerId, chosen: Span, others: Sequence[Placed]) -> bool:
    """Whether another newcomer took some of these layers at the same moment and has the smaller id."""
    return any(each.state == "joining" and each.peer < me and _near(each.span, chosen) for each in others)


def _why(others: Sequence[Placed], chosen: Span, layer_count: int) -> str:
    counts = coverage((other.span for other in others), layer_count)[chosen.start : chosen.end]
    for few, words in ((0, "no peer"), (1, "one peer")):
        if few in counts:
            return f"layers {_run(counts, few, chosen.start)} had {words}"
    slowest = _Layers(others, layer_count).slowest(chosen)
    return f"layer {slowest} was the slowest"


def _run(counts: Sequence[int], value: int, offset: int) -> Span:
    """The first run of that value."""
    start = counts.index(value)
    end = start
    while end < len(counts) and counts[end] == value:
        end += 1
    return Span(offset + start, offset + end)


class _Layers:
    """How often each layer is held, and what each may carry when every peer shares its speed evenly."""

    def __init__(self, placed: Sequence[Placed], layer_count: int) -> None:
        self.held: NDArray[np.int64] = np.zeros(layer_count, np.int64)
        self.carries: NDArray[np.float64] = np.zeros(layer_count)
        self.edges = {0, layer_count}
        # Each span changes two places of a difference, whatever its length.
        held, carries = [0] * (layer_count + 1), [0.0] * (layer_count + 1)
        for each in placed:
            start, end = each.span.start, each.span.end
            share = each.speed / (end - start)
            held[start] += 1
            held[end] -= 1
            carries[start] += share
            carries[end] -= share
            self.edges |= {start, end}
        self.held += np.cumsum(held[:-1])
        self.carries += np.maximum(np.cumsum(carries[:-1]), 0.0) * (self.held > 0)

    def add(self, span: Span, speed: float, times: int = 1) -> None:
        self.held[span.start : span.end] += times
        self.carries[span.start : span.end] += times * speed / len(span)
        self.edges |= {span.start, span.end}

    def best(self, options: Sequence[Span], speed: float) -> Span:
        return min(options, key=lambda span: self._price(span, speed))

    def _price(self, span: Span, speed: float) -> tuple[object, ...]:
        held = self.held.copy()
        held[span.start : span.end] += 1
        carries = self.carries.copy()
        carries[span.start : span.end] += speed / len(span)
        joints = (span.start in self.edges) + (span.end in self.edges)
        lacking = tuple(int((held < copies).sum()) for copies in range(1, COPIES + 1))
        # Rounded, so that a joint decides between spans that help nearly alike.
        weakest = tuple(-np.sort(_rounded(carries)))
        return *lacking, weakest, -joints, -len(span), span.start

    def slowest(self, span: Span) -> int:
        return span.start + int(self.carries[span.start : span.end].argmin())


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """To two digits: neither speeds nor shares are known better."""
    with np.errstate(divide="ignore"):
        digits = np.where(values > 0, 10.0 ** (np.floor(np.log10(values)) - 1), 1.0)
    return np.round(values / digits) * digits


# ---------------------------------------------------------------- what an arrangement is worth


def carried(placed: Sequence[Placed], layer_count: int) -> float:
    """Tokens per second that the peers can take through all layers together, however work is shared.

    The maximum flow. For a given rate, layers are served in order, each by the peers that end first: what
    these have left is of no use later, so if that fails nothing else succeeds.
    """
    ideal = _ideal(placed, layer_count)
    starting = _starting(placed, layer_count)
    low, high = 0.0, ideal
    if _feasible(starting, ideal * (1 - 1e-9)):
        return ideal
    while high - low > 0.001 * ideal:
        middle = (low + high) / 2
        low, high = (middle, high) if _feasible(starting, middle) else (low, middle)
    return low


def _ideal(placed: Sequence[Placed], layer_count: int) -> float:
    """What no arrangement of these peers exceeds."""
    return sum(each.speed for each in placed) / layer_count


def _starting(placed: Sequence[Placed], layer_count: int) -> list[list[tuple[int, float]]]:
    """For each layer, the (end, speed) of all that begins there; peers with the same span are one."""
    together: dict[tuple[int, int], float] = {}
    for each in placed:
        span = each.span.start, each.span.end
        together[span] = together.get(span, 0.0) + each.speed
    starting: list[list[tuple[int, float]]] = [[] for _ in range(layer_count)]
    for (start, end), speed in together.items():
        starting[start].append((end, speed))
    return starting


def _feasible(starting: Sequence[Sequence[tuple[int, float]]], rate: float) -> bool:
    """Whether every layer can have its `rate`; `starting` has (end, speed) of the spans from a layer on."""
    here: list[tuple[int, float]] = []
    for layer, arriving in enumerate(starting):
        for each in arriving:
            heapq.heappush(here, each)
        missing = rate
        while missing > 0:
            while here and here[0][0] <= layer:
                heapq.heappop(here)
            if not here:
                return False
            end, speed = heapq.heappop(here)
            missing -= speed
            if missing < 0:
                heapq.heappush(here, (end, -missing))
    return True


class Worth(msgspec.Struct, frozen=True, order=True):
    """What an arrangement is worth; the first thing that differs decides."""

    held: int
    """Layers that have a peer."""
    safe: int
    """Layers that have `COPIES`."""
    tokens_per_s: float

    def clearly_above(self, other: Worth) -> bool:
        """Enough to move for."""
        if (self.held, self.safe) != (other.held, other.safe):
            return (self.held, self.safe) > (other.held, other.safe)
        return self.tokens_per_s * KEEP > other.tokens_per_s


def worth(placed: Sequence[Placed], layer_count: int) -> Worth:
    counts = coverage((each.span for each in placed), layer_count)
    return Worth(
        sum(count >= 1 for count in counts),
        sum(count >= COPIES for count in counts),
        carried(placed, layer_count),
    )


# ---------------------------------------------------------------- moving


def choose_move(
    me: Placed, others: Sequence[Placed], options: Sequence[Span], layer_count: int
) -> Choice | None:
    """Another span for a peer that serves; None when it should stay, or should not move now.

    A peer first announces that it drains and looks again. When two find each other doing so near by, the one
    with the smaller id goes on. The other one comes back, and a layer that only they hold keeps both.
    """
    staying = _staying(others)
    if not me.movable or _nothing_to_gain([me, *staying], layer_count):
        return None
    wanted = _wanted(me, staying, options, layer_count)
    if wanted is None or not may_leave(me, others, layer_count):
        return None
    if any(_goes_before(each, me) and _near(each.span, me.span, wanted) for each in others):
        return None
    before = worth([me, *staying], layer_count).tokens_per_s
    reason = _why(staying, wanted, layer_count)
    return Choice(wanted, f"{reason}; the swarm carried {before:.3g} tokens/s")


def may_leave(me: Placed, others: Sequence[Placed], layer_count: int) -> bool:
    """Whether each of this peer's layers has another peer that serves it now."""
    counts = coverage((each.span for each in others if each.state == "serving"), layer_count)
    return all(counts[me.span.start : me.span.end])


def _staying(others: Sequence[Placed]) -> list[Placed]:
    return [each for each in others if each.state != "draining"]


def _goes_before(other: Placed, me: Placed) -> bool:
    """Whether this peer has to wait until another one has settled."""
    if other.state == "draining" and me.state == "draining":
        return other.peer < me.peer
    return other.state != "serving"


def _near(span: Span, *places: Span) -> bool:
    return any(span.start < place.end and place.start < span.end for place in places)


def _nothing_to_gain(placed: Sequence[Placed], layer_count: int) -> bool:
    """True when no arrangement could be clearly better: cheap to tell, and most often so in large swarms."""
    layers = _Layers(placed, layer_count)
    if int(layers.held.min()) < COPIES:
        return False
    enough = KEEP * _ideal(placed, layer_count)
    return float(layers.carries.min()) >= enough or _feasible(_starting(placed, layer_count), enough)


def _wanted(me: Placed, others: Sequence[Placed], options: Sequence[Span], layer_count: int) -> Span | None:
    """Where this peer goes in the best arrangement found, if that is clearly better and its turn has come."""
    now = [me, *others]
    before = worth(now, layer_count)
    alone = msgspec.structs.replace(me, span=_Layers(others, layer_count).best(options, me.speed))
    if alone.span != me.span and worth([alone, *others], layer_count).clearly_above(before):
        return alone.span
    if len(now) > SMALL_SWARM:
        return None
    after = _arranged(tuple(_in_order(now)), layer_count)
    if not worth(after, layer_count).clearly_above(before):
        return None
    spans = {each.peer: each.span for each in after}
    movers = [each for each in _in_order(now) if spans[each.peer] != each.span]
    # All peers find the same arrangement; the first that can leaves, and the others look again after it.
    first = next((each for each in movers if may_leave(each, _without(now, each), layer_count)), None)
    return spans[me.peer] if first == me and spans[me.peer] in options else None


@lru_cache(maxsize=16)  # until something changes, a peer that looks again need not search again
def _arranged(placed: tuple[Placed, ...], layer_count: int) -> list[Placed]:
    return arrange(placed, layer_count)


def arrange(placed: Sequence[Placed], layer_count: int, tries: int = TRIES) -> list[Placed]:
    """A better arrangement of the same peers, found by taking a few out and letting them join again.

    The same peers give the same arrangement, on whichever machine it is computed and in any order.
    """
    numbers = random.Random(len(placed))
    best = _in_order(placed)
    best_worth = worth(best, layer_count)
    movable = [index for index, each in enumerate(best) if each.movable]
    for _ in range(tries):
        taken = set(numbers.sample(movable, min(len(movable), numbers.choice((1, 2, 2, 3, 4)))))
        joining = [best[index] for index in sorted(taken)]
        numbers.shuffle(joining)
        tried = _joined([each for index, each in enumerate(best) if index not in taken], joining, layer_count)
        tried_worth = worth(tried, layer_count)
        if tried_worth > best_worth:
            best, best_worth = _in_order(tried), tried_worth
    return best


def _joined(staying: Sequence[Placed], joining: Sequence[Placed], layer_count: int) -> list[Placed]:
    layers = _Layers(staying, layer_count)
    arranged = list(staying)
    for each in joining:
        span = layers.best(spans_of_length(len(each.span), layer_count), each.speed)
        layers.add(span, each.speed)
        arranged.append(msgspec.structs.replace(each, span=span))
    return arranged


def _in_order(placed: Sequence[Placed]) -> list[Placed]:
    return sorted(placed, key=lambda each: each.peer)


def _without(placed: Sequence[Placed], one: Placed) -> list[Placed]:
    return [each for each in placed if each.peer != one.peer]
