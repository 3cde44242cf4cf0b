"""Which link carries a channel's frames, and how much may be under way there. Pure: values in, choice out.

A direct link costs nobody else anything and outlives the relay, so the most direct one is taken unless
another is clearly faster, and left only for one that is much faster. Between the two lies a band in which
nothing changes, and a path that was taken stays a while, so that two alike paths do not alternate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shared.channel.link import LinkKind

# Better by a fifth and by five milliseconds, else a change is not worth the frames that arrive out of order.
BETTER = 1.2
BETTER_MS = 5.0
# What goodput is weighed with: some 16 positions of hidden states, or the chunks that a token waits behind.
WEIGHED_BYTES = 64 * 1024

WINDOW_START_BYTES = 512 * 1024
WINDOW_LEAST_BYTES = 128 * 1024
WINDOW_MOST_BYTES = 4 * 1024 * 1024
# A receiver tells what it consumed within this time, and loops on busy machines turn as slowly.
TURN_S = 0.01

_PREFERENCE: dict[LinkKind, int] = {"socket": 0, "data channel": 1, "relayed": 2}


class Way(NamedTuple):
    """One link as it was measured."""

    kind: LinkKind
    trusted: bool
    """It answered lately; a link that may lead nowhere is only taken when there is no other."""
    rtt_ms: float | None = None
    """The shortest of the last round trips."""
    goodput: float | None = None
    """Bytes a second, measured while more was waiting; None decides nothing."""


def choose(ways: Sequence[Way], current: int | None, *, settled: bool) -> int | None:
    """The index of the way to take, of those that are there; None when there is none.

    `current` is the way in use, if it is still there; `settled` says that it has been for a while.
    """
    if not ways:
        return None
    trusted = [index for index in range(len(ways)) if ways[index].trusted]
    if not trusted:
        # Nothing is known to work. The relay is where a peer that lost its direct link will be.
        return max(range(len(ways)), key=lambda index: (_PREFERENCE[ways[index].kind], index == current))
    cost = _costs_ms([ways[index] for index in trusted])
    fastest_ms = min(cost)
    good = [index for index, ms in zip(trusted, cost, strict=True) if ms <= _clearly_more(fastest_ms)]
    best = min(good, key=lambda index: (_PREFERENCE[ways[index].kind], index != current))
    if current not in trusted or _PREFERENCE[ways[best].kind] < _PREFERENCE[ways[current].kind]:
        return best
    # Twice the margin, so that what was just left is not taken back at once.
    much_slower = cost[trusted.index(current)] > _clearly_more(_clearly_more(fastest_ms))
    return best if settled and much_slower else current


def _costs_ms(ways: Sequence[Way]) -> list[float]:
    """What a message costs on each. What was not measured counts as slow, and as wide, as any other."""
    slowest_ms = max((way.rtt_ms for way in ways if way.rtt_ms is not None), default=0.0)
    widest = max((way.goodput for way in ways if way.goodput), default=float("inf"))
    return [
        (slowest_ms if way.rtt_ms is None else way.rtt_ms) + WEIGHED_BYTES / (way.goodput or widest) * 1000
        for way in ways
    ]


def _clearly_more(ms: float) -> float:
    return ms * BETTER + BETTER_MS


def window_bytes(way: Way) -> int:
    """How much may be sent and not consumed: what keeps the path full, and little more.

    All that is under way delays a token that comes behind it, and fills the memory of both ends.
    """
    if way.goodput is None or way.rtt_ms is None:
        return WINDOW_START_BYTES
    wanted = way.goodput * (1.5 * way.rtt_ms / 1000 + TURN_S)
    # A relay holds so much for one slow reader, of all its channels together.
    most = WINDOW_START_BYTES if way.kind == "relayed" else WINDOW_MOST_BYTES
    return int(min(max(wanted, WINDOW_LEAST_BYTES), most))
