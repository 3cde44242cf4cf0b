"""What a channel knows of each way to its peer: does it take a frame, when did it speak, how far is it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Literal

LinkPath = Literal["direct", "relayed"]

# More pings than this unanswered and the link is dead anyway.
_PINGS = 16


class Link(ABC):
    """One way to the peer that keeps the order of frames. It may lose them all at once, but never some."""

    path: LinkPath

    def __init__(self) -> None:
        self.rtt_ms: float | None = None
        """The round trip, smoothed over some ten pings."""
        self.silent_ticks = 0
        """Ticks of the channel since something arrived here."""
        self.carried = 0
        """How many numbered frames went out here."""
        self._next_ping = 1
        self._pings: deque[tuple[int, float, int]] = deque(maxlen=_PINGS)

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it takes another frame now; `on_room` of its maker is called when that comes true."""

    @abstractmethod
    def send(self, frame: bytes) -> None:
        """Hand over a frame, at once and without fail: what happens to it later is told by pings."""

    def pinged(self, now: float) -> int:
        """The number for a ping that leaves now."""
        number = self._next_ping
        self._next_ping += 1
        self._pings.append((number, now, self.carried))
        return number

    def answered(self, number: int, now: float) -> int | None:
        """A ping came back: how many frames had been carried when it left. None if it is not one of ours."""
        while self._pings and self._pings[0][0] <= number:
            found, sent_at, place = self._pings.popleft()
            if found == number:
                trip_ms = (now - sent_at) * 1000
                self.rtt_ms = trip_ms if self.rtt_ms is None else self.rtt_ms + (trip_ms - self.rtt_ms) / 8
                return place
        return None
