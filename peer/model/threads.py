"""Measure with how many threads this machine computes best, on one layer of the span that it will serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from peer.model.span import Span

WORTH = 0.9
"""More threads must take less than this part of the time. One too many on a busy machine costs half the
speed, and the network and the owner of the machine want a core too."""
PIECE = 32
"""Positions of a piece of a prompt, which counts as much as so many single positions."""
REPEATS = 5


def measure_threads(span: Span, cores: int) -> int:
    """Try one layer with 1 to `cores` threads, and set torch to the number that did best."""
    times = {}
    for threads in candidates(cores):
        torch.set_num_threads(threads)
        times[threads] = _layer_s(span)
    chosen = best(times)
    torch.set_num_threads(chosen)
    return chosen


def candidates(cores: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … and all cores: so few that trying them takes no time."""
    counts = {1, cores}
    for power in range(1, cores.bit_length()):
        counts |= {1 << power, 3 << power - 1}
    return sorted(count for count in counts if count <= cores)


def best(times: Mapping[int, float]) -> int:
    """The fewest threads of which no more are worth it. `times` has seconds for each number of threads."""
    chosen = min(times)
    for threads in sorted(times):
        if times[threads] < WORTH * times[chosen]:
            chosen = threads
    return chosen


def _layer_s(span: Span) -> float:
    """Seconds of the span's first layer for `PIECE` single positions and one piece of as many."""
    inputs = span.trial_inputs(PIECE)
    cache = span.new_cache(span.start, span.start + 1, 2 * PIECE)
    single = _fastest(lambda: span.forward(inputs[:, :1], cache, 0))
    piece = _fastest(lambda: span.forward(inputs, cache, 0))
    return PIECE * single + piece


def _fastest(compute: Callable[[], object]) -> float:
    """The least seconds of a few runs: whatever else the machine does only adds to them."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        compute()
        times.append(time.perf_counter() - began)
    return min(times)
