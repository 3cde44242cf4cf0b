"""How many bytes may be on their way. Pure: it is told of round trips, acknowledgements, losses and the time.

Slow start as in RFC 9260 §7.2.1 with the limit of RFC 3465 lifted, left early when the round trip grows (the
idea of HyStart, RFC 9406); after that an eighth more for each window acknowledged while no queue is felt,
else Reno's one packet. A loss falls back to what the path was seen to deliver (Westwood+), not to half:
aiortc's Reno moves 7 Mbit/s of 100 over 25 ms with one packet in a hundred lost.

Times are seconds of any one clock, sizes are bytes of user data.
"""

from __future__ import annotations

from collections import deque

from shared.channel.fast.chunks import PAYLOAD_BYTES

# A decode message of 16 KiB leaves in one flight, where the three packets of RFC 9260 take three round trips.
INITIAL_WINDOW_BYTES = 32 * PAYLOAD_BYTES
LEAST_WINDOW_BYTES = 4 * PAYLOAD_BYTES

# The other side acknowledges at once, so no time for a delayed SACK is part of it; RFC 9260 says a second,
# and one lost tail packet would stall an answer for as long.
LEAST_TIMEOUT_S = 0.1
FIRST_TIMEOUT_S = 1.0
MOST_TIMEOUT_S = 60.0
# Timeouts that follow each other double up to here: four packets a second burden no path, and an outage
# should not prolong itself.
MOST_BACKOFF_S = 1.0
# Below this a busy machine answers late more often than a packet is lost.
LEAST_PROBE_S = 0.02

# A queue is felt when even the least of the last eight round trips exceeds the least of all by a quarter,
# within these bounds (RFC 9406 says an eighth, which a busy machine adds by itself).
_SAMPLES = 8
_LEAST_QUEUE_S = 0.004
_MOST_QUEUE_S = 0.016
# More loss than this in a round trip is not chance but a short queue that runs over.
_CHANCE_LOSS = 0.08
# A path may change: the least round trip counts for ten seconds.
_LEAST_TRIP_AGE_S = 10.0
_LEAST_SAMPLE_S = 0.02
_MOST_SAMPLE_S = 1.0


class RoundTrips:
    """The round trip as it is measured: smoothed (RFC 6298), the last few, the least of ten seconds."""

    def __init__(self) -> None:
        self.smoothed_s: float | None = None
        self.least_s: float | None = None
        self._variation_s = 0.0
        self._least_since = 0.0
        self._latest: deque[float] = deque(maxlen=_SAMPLES)

    def measured(self, trip_s: float, now: float) -> None:
        self._latest.append(trip_s)
        if self.smoothed_s is None:
            self.smoothed_s, self._variation_s = trip_s, trip_s / 2
        else:
            self._variation_s += (abs(self.smoothed_s - trip_s) - self._variation_s) / 4
            self.smoothed_s += (trip_s - self.smoothed_s) / 8
        if self.least_s is None or trip_s <= self.least_s or now - self._least_since > _LEAST_TRIP_AGE_S:
            self.least_s, self._least_since = trip_s, now

    @property
    def queue_felt(self) -> bool:
        """Whether packets wait somewhere on the path, by the last few round trips."""
        if self.least_s is None:
            return False
        allowed_s = min(_MOST_QUEUE_S, max(_LEAST_QUEUE_S, self.least_s / 4))
        return min(self._latest) > self.least_s + allowed_s

    @property
    def timeout_s(self) -> float:
        """After this long without an answer all that is on its way counts as lost (RFC 9260 §6.3)."""
        if self.smoothed_s is None:
            return FIRST_TIMEOUT_S
        return min(MOST_TIMEOUT_S, max(LEAST_TIMEOUT_S, self.smoothed_s + 4 * self._variation_s))

    def backed_off_s(self, timeouts: int) -> float:
        """How long to wait after so many timeouts in a row (RFC 9260 §6.3.3 rule E2)."""
        return max(self.timeout_s, min(MOST_BACKOFF_S, self.timeout_s * 2.0 ** min(timeouts, 10)))

    @property
    def probe_s(self) -> float:
        """After this long without an answer one asks: a lost tail shows in nothing else (RFC 8985 §7)."""
        return FIRST_TIMEOUT_S if self.smoothed_s is None else max(LEAST_PROBE_S, 2 * self.smoothed_s)


class Congestion:
    """Decides `window_bytes`, from `most_bytes` downwards."""

    def __init__(self, most_bytes: int) -> None:
        self.trips = RoundTrips()
        self.window_bytes = min(INITIAL_WINDOW_BYTES, most_bytes)
        self._most_bytes = most_bytes
        self._slow_start_until_bytes = most_bytes
        self._acknowledged_bytes = 0
        self._round_bytes = 0
        self._round_lost_bytes = 0
        self._rate = 0.0
        self._rate_bytes = 0
        self._rate_since = 0.0

    @property
    def slow_start(self) -> bool:
        return self.window_bytes < self._slow_start_until_bytes

    def acknowledged(self, size: int, now: float, *, held_back: bool) -> None:
        """`size` bytes arrived. A window that has not `held_back` the sender proves nothing, and stays."""
        self._measure_rate(size, now)
        self._round_bytes += size
        if self.slow_start and self.trips.queue_felt and self.window_bytes > INITIAL_WINDOW_BYTES // 2:
            self._slow_start_until_bytes = self.window_bytes
        if not held_back:
            return
        if self.slow_start:
            self.window_bytes += size
        elif not self.trips.queue_felt:
            self.window_bytes += size // 8
        else:
            self._acknowledged_bytes += size
            if self._acknowledged_bytes >= self.window_bytes:
                self._acknowledged_bytes -= self.window_bytes
                self.window_bytes += PAYLOAD_BYTES
        self.window_bytes = min(self.window_bytes, self._most_bytes)

    def lost(self, size: int) -> None:
        """`size` bytes were lost."""
        self._round_lost_bytes += size

    def slow_down(self) -> None:
        """Something was lost in this round trip; to be told once for each, after `lost`."""
        # A decode message lost by chance should not make the next ones wait.
        least = LEAST_WINDOW_BYTES if self.trips.queue_felt else min(INITIAL_WINDOW_BYTES, self.window_bytes)
        half = max(self.window_bytes // 2, least)
        path = self._path_bytes
        if self._round_lost_bytes > _CHANCE_LOSS * (self._round_bytes + self._round_lost_bytes):
            path = min(path, int(0.7 * self.window_bytes))
        self.window_bytes = self._slow_start_until_bytes = max(half, min(path, self.window_bytes))
        self._acknowledged_bytes = self._round_bytes = self._round_lost_bytes = 0

    def timed_out(self) -> None:
        """Nothing came back for a long time: start anew, quickly up to where a loss would have led."""
        self.slow_down()
        self.window_bytes = LEAST_WINDOW_BYTES

    @property
    def _path_bytes(self) -> int:
        """What the path holds without a queue, and a tenth: its rate times its least round trip."""
        return int(1.1 * self._rate * (self.trips.least_s or 0.0))

    def _measure_rate(self, size: int, now: float) -> None:
        """Bytes per second over about a round trip; up at once, down slowly, since senders pause."""
        self._rate_bytes += size
        elapsed = now - self._rate_since
        if elapsed <= max(self.trips.smoothed_s or 0.0, _LEAST_SAMPLE_S):
            return
        if elapsed < _MOST_SAMPLE_S:
            rate = self._rate_bytes / elapsed
            self._rate = max(rate, 0.9 * self._rate + 0.1 * rate)
        self._rate_bytes, self._rate_since = 0, now
