"""Virtual time: a heap of things to do, and a hash over what was done. Same seed, same hash."""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Callable
from typing import Any


class Kernel:
    """`after` some seconds do something; `run` until a time. Nothing here waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._digest = hashlib.blake2b(digest_size=8)

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
        """What is planned for the same moment happens in the order in which it was planned."""
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._number, action, arguments))

    def run(self, until_s: float) -> None:
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            self.now, _, action, arguments = pop(heap)
            self.events += 1
            action(*arguments)
        self.now = until_s

    def note(self, what: str, number: int) -> None:
        """Make an event part of the trace."""
        self._digest.update(struct.pack("<d4sq", self.now, what.encode(), number))

    @property
    def trace(self) -> str:
        return self._digest.hexdigest()
