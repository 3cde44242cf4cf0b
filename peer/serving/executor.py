"""The one thread that owns the device. The event loop never waits on torch; who goes first is for others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


class Executor:
    """Runs functions one after another in its own thread.

    Few calls wait here at a time: the batcher's next pass, and one of each session that is being opened.
    """

    def __init__(self, *, niceness: int = 0) -> None:
        self._niceness = niceness
        """How far other threads of the machine go before this one, where the system allows it."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="executor", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return self._jobs.qsize()

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:  # noqa: ANN401
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

        self._jobs.put(job)
        return await future

    def _work(self) -> None:
        if self._niceness and sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while (job := self._jobs.get()) is not None:
            job()


def _succeed(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
