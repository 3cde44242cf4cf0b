"""Join the steps of all sessions that are ready into one forward pass after another.

While a pass runs in the executor's thread, more steps arrive; whatever is there when it ends makes the next.
So a pass is as wide as the peer is busy, and nobody waits for company. Steps of one position go all at once.
Of longer steps, the first brings a piece, cut by measured time, and then stands behind the others: prompts
advance with every pass, and hold up a token by no more than a piece takes. What standbys are sent is computed
when nothing else is ready.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from peer.model.kv_cache import KVCache
from peer.model.span import Span
from peer.serving.compute import Computed, Draw, Score, Work, compute_pass
from peer.serving.executor import Executor
from shared.protocol import PREFILL_CHUNK, Step

TARGET_MS = 150.0
"""A pass with a piece of a prompt should take about this long: it is what the tokens of others wait."""
SMALLEST_PIECE = 16
"""However slow a machine is: 16 positions reach nine tenths of the speed of packed weights, 4 only half."""
ALONE_S = 1.0
ALONE_TIMES = 4
"""When no second session was here for so long, pieces may be so many times longer: float32 weights reach half
of their speed with 16 positions. Whoever comes next waits for one such piece, once."""
SMOOTHING = 0.1
"""Weight of the newest step in the measured wait."""
IN_BACKGROUND = 5
"""A pass for standbys is so many times shorter than one for prompts: a token that comes then waits for it."""
MOST_SINGLES = 64
"""Sessions that give one position each to a pass. More take turns, in the order in which they came."""

Share = tuple[Work, int]
"""A work, and how many of its positions a pass computes."""


def choose(ready: Iterable[Work], piece: int) -> list[Share]:
    """What the next pass computes: all single positions, and up to `piece` of longer steps, first come first.

    A pass leads through the same layers for all, with the same adapter: those of the first that came.
    """
    shares: list[Share] = []
    layers, singles = None, 0
    for work in ready:
        mine = (work.cache.start, work.cache.end, work.cache.adapter)
        layers = layers or mine
        if mine != layers:
            continue
        if work.left > 1 and piece:
            count = min(piece, work.most)
            piece -= count
            shares.append((work, count))
        elif work.left == 1 and singles < MOST_SINGLES:
            singles += 1
            shares.append((work, 1))
    return shares


class Pace:
    """How long a piece may be, from what passes took and from whether it would hold up anyone."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._fitting = SMALLEST_PIECE
        self._session: KVCache | None = None
        self._company_at = clock()

    @property
    def piece(self) -> int:
        """Positions of the next pass that may be of longer steps."""
        alone = self._clock() - self._company_at > ALONE_S
        return min(PREFILL_CHUNK, self._fitting * (ALONE_TIMES if alone else 1))

    @property
    def background_piece(self) -> int:
        """The same when all that is ready is for standbys."""
        return max(SMALLEST_PIECE, self._fitting // IN_BACKGROUND)

    def took(self, shares: Sequence[Share], pass_ms: float) -> None:
        """A pass computed these and took so long."""
        for work, _ in shares:
            if work.cache is not self._session:
                self._session = work.cache
                self._company_at = self._clock()
        positions = sum(count for _, count in shares)
        if 2 * positions < self._fitting:
            return  # too short to tell
        fitting = positions * TARGET_MS / max(pass_ms, 0.001)
        # Half way each time, so that one pass on a busy machine does not decide alone.
        wanted = round((self._fitting + fitting) / 2)
        self._fitting = min(PREFILL_CHUNK, max(SMALLEST_PIECE, wanted))


class Batcher:
    """Gives each step its turn. `run` it beside whoever calls `compute`.

    Nothing waits here but one step of each admitted session, so no queue needs a bound of its own.
    """

    def __init__(self, span: Span, executor: Executor) -> None:
        self.passes = 0
        """Forward passes so far."""
        self.positions = 0
        """Positions that they computed, of all sessions."""
        self.wait_ms = 0.0
        """What steps of one position waited for their pass, smoothed over the last ones."""
        self.pace = Pace()
        self.on_arrival: Callable[[], None] = lambda: None
        """Called with every step that comes."""
        self._span = span
        self._executor = executor
        self._ready: deque[Work] = deque()
        self._waiting: dict[Work, asyncio.Future[Computed]] = {}
        self._stirred = asyncio.Event()
        self._rested = asyncio.Event()

    async def compute(
        self,
        cache: KVCache,
        step: Step,
        body: bytes | memoryview,
        draw: Draw | None,
        in_background: Callable[[], bool] = lambda: False,
        score: Score | None = None,
    ) -> Computed:
        """Truncate the cache to the step's position, append its inputs, and give what comes out.

        While `in_background` holds, it waits until nothing else is ready. Raises BadInputs or CacheFull when
        the inputs do not fit. A cancelled call computes no further piece.
        """
        work = Work(cache, step, body, draw, in_background, score)
        future: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()
        self._waiting[work] = future
        self._ready.append(work)
        self._stirred.set()
        self.on_arrival()
        came = time.perf_counter()
        try:
            computed = await future
        finally:
            del self._waiting[work]
            if not self._waiting:
                self._rested.set()
        if step.count == 1:
            waited_ms = max(0.0, (computed.ended - came) * 1000 - computed.computed_ms)
            self.wait_ms += SMOOTHING * (waited_ms - self.wait_ms)
        return computed

    async def run(self) -> None:
        """Compute until cancelled."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            while self._ready:
                await self._pass()
                # A session whose token is drawn here comes back at once with its next step. Without this turn
                # of the loop it would just miss the next pass, and two groups would take turns for ever.
                await asyncio.sleep(0)

    async def rested(self) -> None:
        """Returns when no step waits here or is computed."""
        while self.busy:
            self._rested.clear()
            await self._rested.wait()

    @property
    def busy(self) -> bool:
        """Whether steps wait here or are computed."""
        return bool(self._waiting)

    def _forget_cancelled(self) -> None:
        self._ready = deque(
            work for work in self._ready if work in self._waiting and not self._waiting[work].done()
        )

    async def _pass(self) -> None:
        # Whose session is over must not be in a pass: its cache may be another's by now.
        self._forget_cancelled()
        urgent = [work for work in self._ready if not work.in_background()]
        shares = (
            choose(urgent, self.pace.piece) if urgent else choose(self._ready, self.pace.background_piece)
        )
        if not shares:
            return
        took_ms = await self._executor.run(compute_pass, self._span, shares)
        positions = sum(count for _, count in shares)
        self.passes += 1
        self.positions += positions
        if urgent:
            self.pace.took(shares, took_ms)
        for work, _ in shares:
            self._ready.remove(work)
            if work.left:
                self._ready.append(work)
            elif (future := self._waiting.get(work)) is not None and not future.done():
                _settle(future, work)


def _settle(future: asyncio.Future[Computed], work: Work) -> None:
    try:
        future.set_result(work.result())
    except Exception as error:
        future.set_exception(error)
