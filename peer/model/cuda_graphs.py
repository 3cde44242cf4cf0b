"""A recorded step as CUDA graphs: what is the same in every step is launched as a whole.

A graph repeats its kernels on the very memory that it was captured with, so inputs are copied to where it
reads them. What a recording does `aside`, in each layer the look at the sessions' caches, lies between two
graphs, and its result is copied to where the next one reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch

from peer.model.recording import Recording, Registers


class Graph(Protocol):
    """What remembers the work of a function, and repeats it on the same memory."""

    def capture(self, function: Callable[[], None]) -> None: ...

    def replay(self) -> None: ...


class Graphs(Protocol):
    """What makes the graphs of a span."""

    def new(self) -> Graph: ...

    def rehearsal(self) -> AbstractContextManager[None]:
        """While it lasts, what cannot be captured raises RuntimeError."""
        ...


class CudaGraphs:
    """CUDA's, for spans that lie on one GPU. All share a pool of memory: those of a step are repeated in the
    order of their capture, and steps one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def new(self) -> Graph:
        return _CudaGraph(self)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        with self._aside():
            # Whoever waits for the device, as a look at a number does, cannot be captured.
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)

    def capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], None]) -> None:
        """Other threads may go on with what they do on the device."""
        stream = self._stream
        with (
            self._aside(),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            function()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On this device and a stream of its own, which is left whatever happens."""
        with torch.cuda.device(self._device):
            usual = torch.cuda.current_stream()
            self._stream.wait_stream(usual)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                usual.wait_stream(self._stream)


class _CudaGraph:
    def __init__(self, graphs: CudaGraphs) -> None:
        self._graphs = graphs
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], None]) -> None:
        self._graphs.capture(self._graph, function)

    def replay(self) -> None:
        self._graph.replay()


class GraphedStep:
    """A recording for inputs of certain shapes, called like the function that was recorded.

    To make one computes the recording once. Raises RuntimeError when something in it cannot be captured.
    """

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[torch.Tensor],
        graphs: Graphs,
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
                captured = graphs.new()
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
