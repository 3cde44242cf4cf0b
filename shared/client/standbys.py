"""Who stands by for which hop of a session, and how far each has followed. Values only; sends nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shared.client.route_planner import Candidate
from shared.identity import PeerId
from shared.protocol import RouteSpan


class Standby:
    """A peer that holds the same layers as one hop, and follows it."""

    def __init__(self, peer: PeerId, span: RouteSpan) -> None:
        self.peer = peer
        self.start = span.start
        self.end = span.end
        self.epoch = -1
        """The epoch in which it was last asked to follow."""
        self.ready = False
        """It has answered: it has room, and could be a hop at once."""
        self.position = 0
        """What it holds, by its own word."""
        self.sent = 0
        """For the first hop: the token ids that it was sent."""

    @property
    def entry(self) -> RouteSpan:
        """Its entry of a route, should it become a hop."""
        return RouteSpan(self.peer, self.start, self.end)


class Standbys:
    """At most one for each span of a route."""

    def __init__(self) -> None:
        self._by_layers: dict[tuple[int, int], Standby] = {}

    def __iter__(self) -> Iterator[Standby]:
        return iter(list(self._by_layers.values()))

    @property
    def peers(self) -> frozenset[PeerId]:
        return frozenset(standby.peer for standby in self._by_layers.values())

    def of(self, span: RouteSpan) -> Standby | None:
        """Who stands by for these layers."""
        return self._by_layers.get((span.start, span.end))

    def find(self, peer: PeerId) -> Standby | None:
        return next((standby for standby in self._by_layers.values() if standby.peer == peer), None)

    def add(self, peer: PeerId, span: RouteSpan) -> Standby:
        standby = self._by_layers[span.start, span.end] = Standby(peer, span)
        return standby

    def drop(self, standby: Standby) -> None:
        if self._by_layers.get((standby.start, standby.end)) is standby:
            del self._by_layers[standby.start, standby.end]


def choose_standby(
    span: RouteSpan, candidates: Sequence[Candidate], *, tokens: int, busiest: float
) -> PeerId | None:
    """Who should stand by for a span: holds all of it, has room, and has the least to do.

    `busiest` is the wait in ms beyond which a peer is left to those who ask it.
    """
    fitting = [
        candidate
        for candidate in candidates
        if candidate.span.start <= span.start
        and span.end <= candidate.span.end
        and candidate.kv_tokens_free >= tokens
        and candidate.wait_ms <= busiest
    ]
    best = min(fitting, key=_burden, default=None)
    return None if best is None else best.peer


def _burden(candidate: Candidate) -> tuple[float, int, float, str]:
    # Fewer layers first: whoever holds many may be the only one that can stand by elsewhere.
    layers = candidate.span.end - candidate.span.start
    return candidate.sessions + candidate.wait_ms / 10, layers, candidate.rtt_ms or 0.0, candidate.peer
