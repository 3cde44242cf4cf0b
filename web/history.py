"""What the swarm was like in the last hour: `GET /api/history`, for the page. Kept in memory only."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from msgspec import Struct

from shared.background import Background
from shared.client.directory import ServedModel
from shared.protocol import Announcement
from shared.spans import Span, layer_sums
from web.swarm import Swarm

EVERY_S = 15.0
KEPT = 240
"""An hour of them."""
MOST_MODELS = 64
"""A relay that invents models does not fill our memory."""

Json = dict[str, Any]


class Sample(Struct, frozen=True):
    """One model at one time. What a whole route can do is what its weakest layer can."""

    at: float
    """Seconds since 1970."""
    peers: int
    sessions: int
    """Chats and other work under way, as the peers tell; one that leads through three peers counts once."""
    tokens_per_s: int
    """Through all layers, many chats at once, as the peers measured themselves."""
    kv_tokens_free: int
    """Positions of chats that still fit."""


def sample(model: ServedModel, at: float) -> Sample:
    """What the peers of a model say now."""
    serving = [peer for peer in model.peers if peer.state == "serving"]

    def per_layer(worth: Callable[[Announcement], float]) -> list[float]:
        return layer_sums(((Span(peer.start, peer.end), worth(peer)) for peer in serving), model.layer_count)

    speeds = per_layer(lambda peer: (peer.throughput or 0.0) / (peer.end - peer.start))
    return Sample(
        at=round(at, 1),
        peers=len(serving),
        sessions=int(max(per_layer(lambda peer: peer.sessions), default=0)),
        tokens_per_s=int(min(speeds, default=0)),
        kv_tokens_free=int(min(per_layer(lambda peer: peer.kv_tokens_free), default=0)),
    )


class History:
    """The samples of each model that was served in the last hour, the newest last."""

    def __init__(self, swarm: Swarm, clock: Callable[[], float] = time.time) -> None:
        self._swarm = swarm
        self._clock = clock
        self._samples: dict[str, deque[Sample]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[History, None]:
        """Look at the swarm again and again inside the `async with`."""
        async with Background() as tasks:
            tasks.start(self._go_on())
            yield self

    def look(self) -> None:
        """Note how the swarm is now, and forget what is older than an hour."""
        now = self._clock()
        for model in self._swarm.directory.models():
            if model.artefact in self._samples or len(self._samples) < MOST_MODELS:
                self._samples.setdefault(model.artefact, deque(maxlen=KEPT)).append(sample(model, now))
        for artefact, samples in list(self._samples.items()):
            while samples and samples[0].at < now - KEPT * EVERY_S:
                samples.popleft()
            if not samples:
                del self._samples[artefact]

    def view(self) -> Json:
        """For each artefact a list for each field."""
        return {
            artefact: {
                field: [getattr(each, field) for each in samples] for field in Sample.__struct_fields__
            }
            for artefact, samples in self._samples.items()
        }

    async def _go_on(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(EVERY_S)
