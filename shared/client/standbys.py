"""Who stands by for which hop of a session, and how far each has followed. Values only; sends nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shared.client.route_planner import Candidate, usual
from shared.identity import PeerId
from shared.protocol import RouteSpan
from shared.spans import Span


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
        self.lags: dict[int, int] = {}
        """How many positions it lacked when so many tokens were known."""
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

    def ready(self, span: RouteSpan) -> Standby | None:
        """Who could be a hop for these layers at once."""
        standby = self.of(span)
        return standby if standby is not None and standby.ready else None

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

    `busiest` is how many ms a token may take there, with all its sessions, where that is more than twice
    the usual: a peer that cannot keep up would have to catch up with all whom it follows when it is needed.
    """
    pace = usual([candidate.ms_per_layer for candidate in candidates], 1.0)
    most_ms = max(busiest, 2 * pace * (span.end - span.start))
    fitting = [
        (burden, layers, candidate.rtt_ms or 0.0, candidate.peer)
        for candidate in candidates
        if candidate.span.holds(Span(span.start, span.end)) and candidate.kv_tokens_free >= tokens
        # Fewer layers first: whoever holds many may be the only one that can stand by elsewhere.
        for burden, layers in [(_burden_ms(candidate, span, pace), len(candidate.span))]
        if burden <= most_ms
    ]
    return min(fitting)[3] if fitting else None


def _burden_ms(candidate: Candidate, span: RouteSpan, pace: float) -> float:
    """What a token would take there: a slow peer with few sessions may be busier than a fast one."""
    per_layer = candidate.ms_per_layer if candidate.ms_per_layer is not None else pace
    return candidate.wait_ms + (1 + candidate.sessions) * per_layer * (span.end - span.start)
