"""Which peers to ask for their queue before a session opens, and what their answers say. Plain functions.

Announcements are many seconds old. If all who read them took the peer that looks idle, they would meet there.
So the second best route is planned too, the peers in which the two differ are asked, and the better is taken
by their answers: the power of two choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from shared.client.route_planner import BUSY_RETRY_S, Candidate, plan_route
from shared.errors import Busy, CorollaError, NoRoom, NoRoute
from shared.identity import PeerId
from shared.protocol import Load, RouteSpan
from shared.spans import Span

ELSEWHERE_MS = 1e6
"""Added to the price of the first route's peers, so that the second takes others wherever there are any."""


class Choice(msgspec.Struct, frozen=True):
    """Two routes to choose from."""

    peers: frozenset[PeerId]
    """All peers of the two."""
    ask: frozenset[PeerId]
    """Those whose load at this moment decides; nobody when that can make no difference."""
    full: bool = False
    """By what is known, no route has room."""


def two_choices(
    candidates: Sequence[Candidate], layer_count: int, *, model: str, tokens: int, salt: str
) -> Choice:
    """Plan the best route, and the best that avoids its peers where it can. Raises NoRoute."""

    def peers_of(among: Sequence[Candidate], room: int) -> frozenset[PeerId]:
        route = plan_route(among, Span(0, layer_count), model=model, tokens=room, salt=salt)
        return frozenset(PeerId(span.peer) for span in route)

    try:
        first, room, full = peers_of(candidates, tokens), tokens, False
    except Busy:
        first, room, full = peers_of(candidates, 0), 0, True
    second = peers_of([_dearer(each) if each.peer in first else each for each in candidates], room)
    if full:
        return Choice(first | second, first | second, full=True)
    differing = first ^ second
    # With one user on a swarm that is idle, a question would cost a round trip and tell nothing.
    loaded = any(each.sessions or each.wait_ms for each in candidates if each.peer in differing)
    return Choice(first | second, differing if loaded else frozenset())


def _dearer(candidate: Candidate) -> Candidate:
    return msgspec.structs.replace(candidate, wait_ms=candidate.wait_ms + ELSEWHERE_MS)


def informed(candidate: Candidate, load: Load | None, ours: int, replays: Sequence[int] = ()) -> Candidate:
    """A candidate with what its peer said of itself just now, and with `ours`, the sessions we have there.

    `replays` is what it has to compute first for those of them that have just gone there.
    """
    if load is None:
        return msgspec.structs.replace(candidate, sessions=max(candidate.sessions, ours), replays=replays)
    return msgspec.structs.replace(
        candidate,
        sessions=max(load.sessions, ours),
        wait_ms=load.wait_ms,
        ms_per_layer=candidate.ms_per_layer if load.ms_per_layer is None else load.ms_per_layer,
        kv_tokens_free=load.kv_tokens_free,
        replays=replays,
    )


def replays_by_peer(sessions: Iterable[Mapping[PeerId, int]]) -> dict[PeerId, list[int]]:
    """What each peer has to compute first for sessions that have just gone there, from what each told."""
    found: dict[PeerId, list[int]] = {}
    for replaying in sessions:
        for peer, positions in replaying.items():
            if positions > 0:
                found.setdefault(peer, []).append(positions)
    return found


def explain(
    candidates: Sequence[Candidate],
    loads: Mapping[PeerId, Load],
    layer_count: int,
    model: str,
    tokens: int,
) -> CorollaError:
    """Why no route has room: come back when the first is likely to have some, or never."""
    # Whoever did not say how large it is might be large enough.
    at_best = [
        msgspec.structs.replace(
            each, kv_tokens_free=loads[each.peer].kv_tokens if each.peer in loads else tokens
        )
        for each in candidates
    ]
    try:
        route = plan_route(at_best, Span(0, layer_count), model=model, tokens=tokens, salt="")
    except Busy:
        return NoRoom(
            f"no peers of {model} have memory for {tokens} tokens of one conversation: "
            "shorten it, or ask for a shorter answer"
        )
    except NoRoute as error:
        return error
    retry_after_s = max((_retry_after_s(span, loads) for span in route), default=BUSY_RETRY_S)
    return Busy(f"every peer of {model} is full; try again in {retry_after_s:.0f} s", retry_after_s)


def _retry_after_s(span: RouteSpan, loads: Mapping[PeerId, Load]) -> float:
    load = loads.get(PeerId(span.peer))
    return load.retry_after_s if load is not None else BUSY_RETRY_S
