"""When a peer may work for trainings, so that chats hardly notice. Decides by a clock; computes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SHARE = 0.25
"""Of its time, a chat may spend this much waiting for trainings, on all hops of its route together."""
ACTIVE_S = 1.0
"""A chat whose last step is so long ago is not waiting for the next one."""
SAVED_MS = 100.0
"""What chats may be made to wait at once after a time without a collision."""
ALONE_MS = 600.0
BESIDE_CHATS_MS = 15.0
"""How long a piece of a training's pass may be: a step that comes meanwhile waits for its end. Without chats
a piece should hold all layers, since else some are computed once more; a new chat meets one such piece."""

LOOK_S = 0.05


class Courtesy:
    """Tell it of steps and pieces; it tells whether the next piece may begin.

    A piece delays nobody if no step comes while it runs, so only true delays are counted: chats give an
    allowance as time passes, and whoever used it up lets them pass undisturbed until it has grown again.
    """

    def __init__(self, hops: Callable[[], int], clock: Callable[[], float] = time.perf_counter) -> None:
        self._hops = hops
        self._clock = clock
        self._allowance_ms = SAVED_MS
        self._stepped_at: float | None = None
        self._running = False
        self._hit_at: float | None = None

    @property
    def piece_ms(self) -> float:
        """How long the next piece should be at most."""
        return BESIDE_CHATS_MS if self.chats_run else ALONE_MS

    @property
    def chats_run(self) -> bool:
        """Whether a chat's next step is expected."""
        return self._stepped_at is not None and self._clock() - self._stepped_at < ACTIVE_S

    @property
    def wait_s(self) -> float:
        """How long to let chats pass before the next piece; 0 when it may begin."""
        if not self.chats_run or self._allowance_ms >= 0:
            return 0.0
        return -self._allowance_ms / (1000 * SHARE / max(1, self._hops()))

    async def patience(self) -> None:
        """Returns when the next piece may begin."""
        while (wait_s := self.wait_s) > 0:  # noqa: ASYNC110 - it is a time that we wait for
            await asyncio.sleep(min(wait_s, LOOK_S))

    def stepped(self) -> None:
        """A chat's step came."""
        now = self._clock()
        if self._stepped_at is not None:
            passed_ms = min(now - self._stepped_at, ACTIVE_S) * 1000
            earned = passed_ms * SHARE / max(1, self._hops())
            self._allowance_ms = min(SAVED_MS, self._allowance_ms + earned)
        self._stepped_at = now
        if self._running and self._hit_at is None:
            self._hit_at = now

    def began(self) -> None:
        """A piece begins."""
        self._running, self._hit_at = True, None

    def ended(self) -> None:
        """It ended; if a step came meanwhile, that one waited."""
        if self._hit_at is not None:
            self._allowance_ms -= (self._clock() - self._hit_at) * 1000
        self._running, self._hit_at = False, None
