"""Tokens' routes and re-routes as JSON for the page: ids become names, and a re-route becomes a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.client.directory import Directory
from shared.client.session import Reason, Rerouted
from shared.identity import PeerId
from shared.protocol import Hop, RouteSpan
from shared.spans import Span
from web.chat import TokenTrace

Json = dict[str, Any]

REASONS: dict[Reason, str] = {
    "lost": "went away",
    "declined": "had no room",
    "late": "did not answer in time",
    "leaving": "is leaving",
}


def tokens_view(tokens: Sequence[TokenTrace], directory: Directory) -> list[Json]:
    """What each token met on its way."""
    return [
        {
            "position": token.position,
            "ms": round(token.ms, 3),
            "hops": [_hop_view(hop, directory) for hop in token.hops],
        }
        for token in tokens
    ]


def reroute_view(event: Rerouted, directory: Directory) -> Json:
    """Who is gone, who took over, and the whole new route."""
    return {
        "kind": "rerouted",
        "message": reroute_sentence(event, directory),
        "lost": event.lost,
        "lost_name": directory.name(event.lost),
        "route": [_span_view(span, directory) for span in event.route],
    }


def reroute_sentence(event: Rerouted, directory: Directory) -> str:
    """What happened, for people."""
    lost = f"{directory.name(event.lost)} (layers {Span(*event.lost_span)})"
    heirs = [span.peer for span in event.route if _overlap(span, event.lost_span)]
    if heirs == [event.lost]:
        return f"the connection to {lost} broke; it was made anew"
    names = " and ".join(directory.name(PeerId(peer)) for peer in heirs)
    follow = "had followed along and took over" if event.stood_by else "took over"
    return f"{lost} {REASONS[event.reason]}; {names} {follow}"


def _overlap(span: RouteSpan, layers: tuple[int, int]) -> bool:
    start, end = layers
    return span.start < end and start < span.end


def _hop_view(hop: Hop, directory: Directory) -> Json:
    return {
        "peer": hop.peer,
        "name": directory.name(PeerId(hop.peer)),
        "start": hop.start,
        "end": hop.end,
        "waited_ms": round(hop.waited_ms, 3),
        "computed_ms": round(hop.computed_ms, 3),
        "path": hop.path,
        **({} if hop.link_ms is None else {"link_ms": round(hop.link_ms, 3)}),
    }


def _span_view(span: RouteSpan, directory: Directory) -> Json:
    return {
        "peer": span.peer,
        "name": directory.name(PeerId(span.peer)),
        "start": span.start,
        "end": span.end,
    }
