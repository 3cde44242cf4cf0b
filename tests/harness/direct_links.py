"""Two direct links in one process, described to each other by hand, with or without a lossy path between."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from shared.channel import webrtc
from shared.channel.link import Link
from shared.channel.webrtc import DirectLink, Transports, new_certificate
from shared.framing import CHUNK_BYTES, HEADER_BYTES
from tests.harness.lossy_path import LossyPath

MAX_FRAME_BYTES = HEADER_BYTES + CHUNK_BYTES


class Side:
    """One link with what came through it."""

    def __init__(self, controlling: bool, transports: Transports | None = None) -> None:
        self.frames: list[bytes] = []
        self.count = 0
        self.received_bytes = 0
        self.keep = True
        self._digest = hashlib.sha256()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self.link = DirectLink(
            new_certificate(), controlling, None, self._frame, self._room.set, transports=transports
        )

    def _frame(self, _: Link, frame: bytes) -> None:
        self.count += 1
        self.received_bytes += len(frame)
        self._digest.update(len(frame).to_bytes(4, "big") + frame)
        if self.keep:
            self.frames.append(frame)
        self._arrived.set()

    @property
    def digest(self) -> str:
        """A hash over all frames that came, their lengths and their order."""
        return self._digest.hexdigest()

    async def got(self, count: int) -> list[bytes]:
        """Wait until so many frames have come."""
        while self.count < count:
            self._arrived.clear()
            await self._arrived.wait()
        return self.frames

    async def send(self, frame: bytes) -> None:
        """Hand over a frame, waiting while the link is full."""
        while not self.link.ready:
            assert not self.link.lost.is_set(), "the link was lost"
            self._room.clear()
            await self._room.wait()
        self.link.send(frame)

    async def send_all(self, frames: Iterable[bytes]) -> str:
        """Hand over many, and tell what their digest is."""
        digest = hashlib.sha256()
        for frame in frames:
            digest.update(len(frame).to_bytes(4, "big") + frame)
            await self.send(frame)
        return digest.hexdigest()


def random_frames(total_bytes: int, seed: int) -> Iterable[bytes]:
    """Frames of all lengths that together have at least so many bytes."""
    chance = random.Random(seed)
    made = 0
    while made < total_bytes:
        size = chance.choice((1, 100, 1159, 1160, 1161, 3000, MAX_FRAME_BYTES, MAX_FRAME_BYTES))
        made += size
        yield chance.randbytes(size)


def frames_in(total_bytes: int, seed: int) -> int:
    """How many `random_frames` yields."""
    return sum(1 for _ in random_frames(total_bytes, seed))


@asynccontextmanager
async def linked(
    one: Transports | None = None, other: Transports | None = None, *, path: LossyPath | None = None
) -> AsyncIterator[tuple[Side, Side]]:
    """Two sides with an open link. Without naming transports they are those that programs use."""
    ann, bob = Side(True, one or webrtc.TRANSPORTS), Side(False, other or webrtc.TRANSPORTS)
    try:
        described = await asyncio.gather(ann.link.describe(1), bob.link.describe(1))
        ann_shown, bob_shown = await path.between(*described) if path else described
        await asyncio.gather(ann.link.open(bob_shown), bob.link.open(ann_shown))
        if path:
            path.begin()
        yield ann, bob
    finally:
        await asyncio.gather(ann.link.close(), bob.link.close())
