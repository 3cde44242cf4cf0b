"""The swarm as the page shows it: `GET /api/swarm`, and the same again with every change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson

from shared.background import Background
from shared.channel import PathReport
from shared.client.directory import ServedModel
from shared.identity import PeerId
from shared.protocol import Announcement, Path
from web.swarm import Swarm

Json = dict[str, Any]

SHORTEST_S = 0.25
"""Between two views: the page draws no faster, and a thousand changes at once cost one view."""
LOOK_AGAIN_S = 1.0
"""Leases run out and links change without a word, so the view is looked at now and then."""

REMEMBERED = 2000
"""Names of models that were served; a relay that invents more does not fill our memory."""


def swarm_view(swarm: Swarm) -> Json:
    """The relays, every model that is served, and every live peer.

    `relay` is the one to tell newcomers of; connected is whoever reaches any.
    """
    relays = [{"url": relay.url, "connected": relay.connected.is_set()} for relay in swarm.relays]
    links = swarm.links()
    paths = swarm.path_reports()
    models = swarm.directory.models()
    return {
        "relay": {"url": relays[0]["url"], "connected": any(relay["connected"] for relay in relays)},
        "relays": relays,
        "models": [_model_view(model) for model in models],
        "peers": [
            _peer_view(peer, *links.get(PeerId(peer.peer), (None, None)), report=paths.get(PeerId(peer.peer)))
            for model in models
            for peer in model.peers
        ],
    }


def _model_view(model: ServedModel) -> Json:
    return {
        "model": model.name,
        "artefact": model.artefact,
        "layer_count": model.layer_count,
        "context_length": model.context_length,
        "coverage": model.coverage,
        "gaps": [[gap.start, gap.end] for gap in model.gaps],
        "covered": model.covered,
    }


def _peer_view(
    peer: Announcement, path: Path | None, rtt_ms: float | None, *, report: PathReport | None
) -> Json:
    return {
        "peer": peer.peer,
        "name": peer.name,
        "model": peer.model,
        "artefact": peer.artefact,
        "start": peer.start,
        "end": peer.end,
        "state": peer.state,
        "dtype": peer.dtype,
        "device": peer.device,
        "kv_tokens_free": peer.kv_tokens_free,
        "ms_per_layer": peer.ms_per_layer,
        "throughput": peer.throughput,
        "sessions": peer.sessions,
        "path": path,
        "rtt_ms": rtt_ms if rtt_ms is None else round(rtt_ms, 1),
        "path_words": None if report is None else report.words(),
        "path_rests": report is not None and report.resting,
    }


class SwarmFeed:
    """One view for everyone who watches, made anew when something changed.

    Watchers take the newest view when they are ready; there is no queue, so a slow one only misses
    views that are out of date.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._view = b""
        self._version = 0
        self._renewed = asyncio.Condition()
        self._changed = asyncio.Event()
        self._closed = False
        self._shown: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[SwarmFeed, None]:
        """Keep the view fresh inside the `async with`."""
        unlisten = self._swarm.directory.listen(self._changed.set)
        try:
            async with Background() as tasks:
                tasks.start(self._refresh())
                yield self
        finally:
            unlisten()

    async def views(self, quiet_s: float) -> AsyncGenerator[bytes | None, None]:
        """The view as JSON now and after every change; None when nothing changed for `quiet_s`."""
        seen = 0
        while not self._closed:
            try:
                async with asyncio.timeout(quiet_s), self._renewed:
                    while self._version == seen and not self._closed:
                        await self._renewed.wait()
            except TimeoutError:
                yield None
                continue
            if self._version != seen:
                seen = self._version
                yield self._view

    def has_shown(self, model: str) -> bool:
        """True when a model of this name or artefact was served at some time since we started."""
        return model in self._shown

    async def close(self) -> None:
        """End every watcher's iteration, so that the gateway need not wait for people to leave."""
        self._closed = True
        async with self._renewed:
            self._renewed.notify_all()

    async def _refresh(self) -> None:
        while True:
            self._changed.clear()
            self._remember_models()
            view = orjson.dumps(swarm_view(self._swarm))
            if view != self._view:
                self._view = view
                self._version += 1
                async with self._renewed:
                    self._renewed.notify_all()
            await asyncio.sleep(SHORTEST_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await self._changed.wait()

    def _remember_models(self) -> None:
        for model in self._swarm.directory.models():
            if len(self._shown) < REMEMBERED:
                self._shown |= {model.name, model.artefact}
