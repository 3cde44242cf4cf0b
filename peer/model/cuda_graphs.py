"""A recorded step as CUDA graphs: what is the same in every step is launched as a whole.

A graph repeats its kernels on the very memory that it was captured with, so inputs are copied to where it
reads them. What a recording does `aside`, in each layer the look at the sessions' caches, lies between two
graphs, and its result is copied to where the next one reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from peer.model.recording import Recording, Registers


class Graph(Protocol):
    """What remembers the work of a function, and repeats it on the same memory."""

    def capture(self, function: Callable[[], None]) -> None: ...

    def replay(self) -> None: ...


class CudaGraph:
    """One of CUDA's. Those with one pool share memory: of a step they are repeated in the order of capture,
    and steps one after another."""

    def __init__(self, pool: Any) -> None:  # noqa: ANN401 - a handle without a public type
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, function: Callable[[], None]) -> None:
        # Other threads may go on with what they do on the device.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            function()

    def replay(self) -> None:
        self._graph.replay()


def graphs(device: torch.device) -> Callable[[], Graph] | None:
    """What makes the graphs of a span, which share a pool of memory; None where there are none."""
    return partial(CudaGraph, torch.cuda.graph_pool_handle()) if device.type == "cuda" else None


class GraphedStep:
    """A recording for inputs of certain shapes, called like the function that was recorded.

    To make one computes the recording once. Raises RuntimeError when something in it cannot be captured.
    """

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[torch.Tensor],
        graph: Callable[[], Graph],
    ) -> None:
        self._inputs = [each.clone() for each in inputs]
        self._parts: list[Callable[[], None]] = []
        registers = recording.registers(self._inputs)
        for aside, piece in recording.pieces():
            if aside:
                before = list(registers)
                piece(registers)
                self._parts.append(partial(_refill, piece, before, registers_made(before, registers)))
            else:
                captured = graph()
                captured.capture(partial(piece, registers))
                captured.replay()
                self._parts.append(captured.replay)
        self._result = recording.result(registers)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        for part in self._parts:
            part()
        # The next step writes there again.
        return self._result.clone()


def registers_made(before: Registers, after: Registers) -> dict[int, torch.Tensor]:
    """Those that a piece has filled, by number."""
    pairs = zip(before, after, strict=True)
    return {number: new for number, (old, new) in enumerate(pairs) if new is not None and new is not old}


def _refill(piece: Callable[[Registers], None], before: Registers, places: dict[int, torch.Tensor]) -> None:
    """Run a piece on the memory that lies before it, and copy what it gives to where it is read."""
    registers = list(before)
    piece(registers)
    for number, place in places.items():
        place.copy_(registers[number], non_blocking=True)
