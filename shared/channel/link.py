"""What a channel knows of each way to its peer: does it take a frame, when did it speak, how far is it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Literal

from shared.framing import LONG_CHUNK_BYTES

LinkPath = Literal["direct", "relayed"]
LinkKind = Literal["relayed", "data channel", "socket"]

# More pings than this unanswered and the link is dead anyway.
_PINGS = 16
_TRIPS = 8
# A goodput is measured over at least so much.
_MEASURED_BYTES = 128 * 1024
_MEASURED_S = 0.05


class Link(ABC):
    """One way to the peer that keeps the order of frames. It may lose them all at once, but never some."""

    path: LinkPath
    kind: LinkKind
    chunk_bytes = LONG_CHUNK_BYTES
    """How much of a long message goes into one frame here."""

    def __init__(self) -> None:
        self.rtt_ms: float | None = None
        """The round trip, smoothed over some ten pings."""
        self.trusted = False
        """It answered a ping, and was not silent since."""
        self.base_rtt_ms: float | None = None
        """The shortest round trip ever: how far the peer is, without any queue."""
        self.silent_ticks = 0
        """Ticks of the channel since something arrived here."""
        self.carried = 0
        """How many numbered frames went out here."""
        self.delivered = 0
        """How many bytes of them were consumed."""
        self.goodput: float | None = None
        """Bytes a second consumed while more waited; None until that was so."""
        self._next_ping = 1
        self._pings: deque[tuple[int, float, int]] = deque(maxlen=_PINGS)
        self._trips: deque[float] = deque(maxlen=_TRIPS)
        self._busy: tuple[float, int] | None = None

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it takes another frame now; `on_room` of its maker is called when that comes true."""

    @abstractmethod
    def send(self, frame: bytes) -> None:
        """Hand over a frame, at once and without fail: what happens to it later is told by pings."""

    @property
    def overrun(self) -> bool:
        """True when the peer sends without regard to what it was allowed."""
        return False

    @property
    def least_rtt_ms(self) -> float | None:
        """The shortest of the last round trips: what a queue of our own adds comes and goes."""
        return min(self._trips, default=None)

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
                self._trips.append(trip_ms)
                self.base_rtt_ms = min(trip_ms, self.base_rtt_ms or trip_ms)
                self.rtt_ms = trip_ms if self.rtt_ms is None else self.rtt_ms + (trip_ms - self.rtt_ms) / 8
                return place
        return None

    def calm(self) -> None:
        """Nothing waits for this link: what it delivers now tells nothing of what it could."""
        self._busy = None

    def measure(self, now: float) -> bool:
        """More waits while frames were consumed; True when that gave a new goodput."""
        if self._busy is None:
            self._busy = now, self.delivered
            return False
        since, before = self._busy
        passed_s, passed_bytes = now - since, self.delivered - before
        if passed_s < _MEASURED_S or passed_bytes < _MEASURED_BYTES:
            return False
        rate = passed_bytes / passed_s
        # Up at once, down slowly: a reader that paused, or our own stall, is not the link's fault.
        self.goodput = rate if self.goodput is None else max(rate, self.goodput + (rate - self.goodput) / 4)
        self._busy = now, self.delivered
        return True
