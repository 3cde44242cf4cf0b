"""The one thread that owns the device. The event loop never waits on torch; decode goes before prefill."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

Result = TypeVar("Result")

DECODE = 0
PREFILL = 1
_STOP = 2


class Executor:
    """Runs functions one after another in its own thread.

    The queue is bounded by the sessions that a peer admits: each has at most one job here.
    """

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._work, name="executor", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put((_STOP, next(self._order), self._thread.join))
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return self._jobs.qsize()

    async def run(self, priority: int, function: Callable[..., Result], *arguments: Any) -> Result:  # noqa: ANN401
        """Call `function(*arguments)` in the thread and wait for its result or error.

        A cancelled call that has begun runs to its end in the thread; its result is dropped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def job() -> None:
            if future.cancelled():
                return
            try:
                result = function(*arguments)
            except Exception as error:
                loop.call_soon_threadsafe(_fail, future, error)
            else:
                loop.call_soon_threadsafe(_succeed, future, result)

        self._jobs.put((priority, next(self._order), job))
        return await future

    def _work(self) -> None:
        while True:
            priority, _, job = self._jobs.get()
            if priority == _STOP:
                return
            job()


def _succeed(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
