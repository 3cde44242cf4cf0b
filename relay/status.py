"""Read-only pages about the relay: is it well, and who serves which layers. No addresses, no prompts."""

from __future__ import annotations

import time
from typing import Any

import orjson
from aiohttp import web

from relay.meeting import Meeting
from relay.registry import Entry
from relay.sessions import MEETING
from shared.spans import Span, coverage, gaps

ABOUT = """Corolla relay

People run a large language model together. This is where their machines meet: it knows who serves which
layers and carries sealed messages between those that cannot reach each other directly. It sees no prompts.

  /ws         where peers and gateways connect (WebSocket)
  /api/swarm  models, coverage and peers, as JSON
  /healthz    whether this relay is well, as JSON
"""

# The swarm page may cost this share of the relay's time, however large the swarm and however often asked for.
MAX_SHARE = 1 / 20


class SwarmPage:
    """The JSON of `/api/swarm`, made anew only as often as its cost allows."""

    def __init__(self) -> None:
        self._body = b""
        self._fresh_until = 0.0

    async def serve(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        if started >= self._fresh_until:
            meeting = request.app[MEETING]
            self._body = orjson.dumps(swarm(meeting, meeting.clock()))
            done = time.monotonic()
            self._fresh_until = done + (done - started) / MAX_SHARE
        return _json(self._body)


async def health(request: web.Request) -> web.Response:
    """The `/healthz` route."""
    meeting = request.app[MEETING]
    frames, counts = meeting.frames, meeting.counts
    return _json(
        orjson.dumps(
            {
                "status": "ok",
                "participants": len(meeting.participants),
                "announcements": len(meeting.registry),
                "stun_port": meeting.stun_ports[0],
                "unwritten": meeting.writer.waiting if meeting.writer else 0,
                "logins": counts.logins,
                "refused_logins": counts.refused_logins,
                "accepted_announcements": counts.announcements,
                "signals": counts.signals,
                "lookups": counts.lookups,
                "denied": counts.denied,
                "refused_connections": counts.refused_connections,
                "refused_announcements": counts.refused_announcements,
                "slowed_s": round(counts.slowed_s, 3),
                "idle": counts.idle,
                "frames_forwarded": frames.forwarded,
                "bytes_forwarded": frames.forwarded_bytes,
                "frames_undeliverable": frames.undeliverable,
                "frames_dropped": frames.dropped,
            }
        )
    )


async def about(_request: web.Request) -> web.Response:
    """The `/` route."""
    return web.Response(text=ABOUT, headers=_HEADERS)


def swarm(meeting: Meeting, now: float) -> dict[str, Any]:
    """What is served right now, by model and artefact."""
    by_artefact: dict[tuple[str, str], list[Entry]] = {}
    for entry in meeting.registry.live(now):
        announcement = entry.announcement
        by_artefact.setdefault((announcement.model, announcement.artefact), []).append(entry)
    return {"models": [_model(meeting, entries, now) for _, entries in sorted(by_artefact.items())]}


def _model(meeting: Meeting, entries: list[Entry], now: float) -> dict[str, Any]:
    first = entries[0].announcement
    serving = [
        Span(entry.announcement.start, entry.announcement.end)
        for entry in entries
        if entry.announcement.state == "serving" and entry.peer not in meeting.registry.departed
    ]
    counts = coverage(serving, first.layer_count)
    return {
        "model": first.model,
        "artefact": first.artefact,
        "layer_count": first.layer_count,
        "coverage": counts,
        "gaps": [[gap.start, gap.end] for gap in gaps(counts)],
        "peers": [
            _peer(meeting, entry, now)
            for entry in sorted(entries, key=lambda entry: (entry.announcement.start, entry.peer))
        ],
    }


def _peer(meeting: Meeting, entry: Entry, now: float) -> dict[str, Any]:
    announcement = entry.announcement
    return {
        "peer": announcement.peer,
        "name": announcement.name,
        "start": announcement.start,
        "end": announcement.end,
        "state": announcement.state,
        "dtype": announcement.dtype,
        "device": announcement.device,
        "context_length": announcement.context_length,
        "kv_tokens_free": announcement.kv_tokens_free,
        "ms_per_layer": announcement.ms_per_layer,
        "connected": entry.peer in meeting.participants,
        "renewed_s_ago": round(max(0.0, now - announcement.issued_at), 1),
        "expires_in_s": round(announcement.expires_at - now, 1),
    }


# Names come from strangers: nothing here may be taken for a page, framed, or kept.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers=_HEADERS)
