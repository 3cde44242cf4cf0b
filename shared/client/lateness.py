"""When a step is late, and how often one may act on that. Knows no clock: it is told what time it is."""

from __future__ import annotations

from collections import deque
from math import ceil

REMEMBERED = 64
"""Steps that tell what is usual."""
ENOUGH = 8
"""With fewer steps than these nothing is usual yet."""
SHARE = 0.95
TIMES = 2.0
FLOOR_S = 0.3
"""Below this nobody sees a pause, and a busy machine has them all the time."""
MOST_TIMES = 16.0
EVERY = 40
"""Steps that pay for one hedge: it costs about two, one anew at every hop and what the standby lags."""
SAVED = 2.0


class Lateness:
    """The steps of one session: twice what 19 of 20 took is late.

    The more often a hedge was in vain, the later a step must be for the next one.
    """

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=REMEMBERED)
        self._times = TIMES
        self._saved = 1.0

    def took(self, seconds: float) -> None:
        """A step was over after so long."""
        self._took.append(seconds)
        self._saved = min(SAVED, self._saved + 1 / EVERY)

    @property
    def limit_s(self) -> float | None:
        """After so long a step is late; None while that is unknown, or nothing may be done about it."""
        if len(self._took) < ENOUGH or self._saved < 1.0:
            return None
        usual = sorted(self._took)[ceil(SHARE * len(self._took)) - 1]
        return max(FLOOR_S, usual * self._times)

    def spend(self) -> None:
        """Something was done about a late step."""
        self._saved -= 1.0

    def in_vain(self) -> None:
        """The late answer came first after all."""
        self._times = min(MOST_TIMES, self._times * 2)
