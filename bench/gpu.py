"""How much of a GPU's memory speed one session gets from a span, and what many sessions get together.

A token reads every weight of its span once. So bytes of weights per second, over the rate at which the card
copies memory, tells how far a span is from the best it could be. `bench.engine --device cuda` asks for it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import sessions
from peer.model.checkpoint import Checkpoint
from peer.model.quantization import choose
from peer.model.span import Span

COPIED = 1 << 30
"""Bytes that are copied to measure the card: far more than any cache holds."""
CONTEXT = 128


@dataclass(frozen=True)
class Figures:
    """What one span of so many layers reached."""

    weights: str
    layers: int
    share: float
    """Bytes of weights per second of one session, over what the device reads and writes while it copies."""
    rates: dict[int, float]
    """Sessions -> tokens per second of all of them."""


def copy_rate(device: torch.device, times: int = 5) -> float:
    """Bytes per second that the device reads and writes while it copies memory: the best of some tries."""
    here, there = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    best = 0.0
    for _ in range(times + 1):
        wait_for(device)
        began = time.perf_counter()
        there.copy_(here)
        wait_for(device)
        best = max(best, 2 * COPIED / (time.perf_counter() - began))
    return best


def wait_for(device: torch.device) -> None:
    """A GPU computes while the program goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bytes(span: Span) -> int:
    """Bytes of weights that one token reads: all but the embedding, of which it looks up one row.

    The span begins at layer 0, and its head has weights of its own.
    """
    return span.weights_bytes - span.vocab_size * span.hidden_size * span.dtype.itemsize


def measure(
    checkpoint: Checkpoint,
    device: torch.device,
    weights: Sequence[str],
    layers: Sequence[int],
    widths: Sequence[int],
    *,
    tokens: int,
    rounds: int,
    kernels: Path,
) -> Iterator[Figures]:
    """For each way to keep weights (as `--quantize`) and each number of layers, one after another."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fastest = copy_rate(device)
    for name in weights:
        for count in layers:
            quantization = choose(name, dtype, device, kernels)
            span = Span.load(checkpoint, 0, count, dtype=dtype, device=device, quantization=quantization)
            found = asyncio.run(sessions.rates(span, widths, CONTEXT, tokens, rounds))
            share = found[widths[0]] / widths[0] * read_bytes(span) / fastest
            yield Figures(name, count, share, found)
            del span
            gc.collect()
