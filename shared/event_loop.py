"""The event loop of our programs: uvloop where it is installed, asyncio's own elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
# An extra, since Windows has none and nothing needs it: a relayed round trip takes 0.4 ms instead of 0.75.
try:
    import uvloop
except ImportError:
    pass
else:
    new_event_loop = uvloop.new_event_loop

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a program to its end, as `asyncio.run` does, Ctrl-C included."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def name() -> str:
    """Which loop `run` uses, for people."""
    return "uvloop" if new_event_loop is not asyncio.new_event_loop else "asyncio"
