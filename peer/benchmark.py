"""Measure this machine with a model: how fast it computes a layer, and what a layer takes of its memory.

The measure of speed is real forward passes, of several sessions at once as when the peer serves. It is kept
on disk, since it is the same at the next start.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from peer.model import family
from peer.model.anatomy import find_layers
from peer.model.checkpoint import Checkpoint
from peer.model.quantization import ROWS, Form, Quantization
from peer.model.span import Span
from peer.placement import spans_that_fit
from shared.spans import Span as Layers

log = logging.getLogger(__name__)

BATCHES = (1, 4, 16)
"""Sessions in one pass. On every device we know, more than sixteen bring little on top."""
HELD = 64
"""Positions that each session holds: attention to a context costs something, in a typical chat not much."""
REPEATS = 8
"""The first few learn the step; the others take what it takes from then on."""
FRESH_S = 7 * 24 * 3600.0
"""A measure is taken again after that time: the machine may have been busy with something else."""
TRIED = 256
"""Rows and columns of the matrix that tells what a weight takes in a form."""


# ---------------------------------------------------------------- speed


class Speed(msgspec.Struct, frozen=True):
    """What one layer takes on this machine."""

    throughput: float
    """Positions through one layer in a second, with the number of sessions that is best."""
    ms_per_layer: float
    """One position of one session through one layer."""
    measured_at: float = 0.0


def measure_speed(span: Span, max_sessions: int) -> Speed:
    """Send single positions of 1, 4 and 16 sessions through the middle layer of a loaded span."""
    times = {count: _pass_s(span, count) for count in BATCHES if count <= max(1, max_sessions)}
    return Speed(max(count / taken for count, taken in times.items()), times[1] * 1000, time.time())


def _pass_s(span: Span, sessions: int) -> float:
    layer = (span.start + span.end) // 2
    numbers = torch.Generator().manual_seed(0)

    def inputs(count: int) -> torch.Tensor:
        if layer == 0:
            return torch.randint(span.vocab_size, (1, count), generator=numbers)
        return torch.randn(1, count, span.hidden_size, generator=numbers, dtype=span.dtype)

    caches = [span.new_cache(layer, layer + 1, HELD + 1) for _ in range(sessions)]
    for cache in caches:
        span.forward(inputs(HELD), cache, 0)
    # Each time another: a step that is done again with the same numbers shows nothing to those who check it.
    steps = itertools.cycle([inputs(1) for _ in range(REPEATS)])

    def compute() -> None:
        step = next(steps)
        rows = [span.row(step, cache, HELD, wanted=0) for cache in caches]
        outputs = span.forward_rows(rows)
        if span.device.type != "cpu" and outputs[0] is not None:
            outputs[0].float().sum().item()  # a GPU works on after the call

    return fastest_s(compute)


def fastest_s(compute: Callable[[], object]) -> float:
    """The least seconds of a few runs: whatever else the machine does only adds to them."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        compute()
        times.append(time.perf_counter() - began)
    return max(1e-9, min(times))


class SpeedBook:
    """Measures kept on disk: one file for each artefact, device and way of computing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, artefact: str, device: torch.device, threads: int | None) -> Speed | None:
        """The measure, if there is one that is not too old."""
        try:
            speed = msgspec.json.decode(self._path(artefact, device, threads).read_bytes(), type=Speed)
        except (OSError, msgspec.DecodeError):
            return None
        return speed if 0 <= time.time() - speed.measured_at < FRESH_S else None

    def keep(self, artefact: str, device: torch.device, threads: int | None, speed: Speed) -> None:
        """A disk that is full costs the next start its time, and nothing else."""
        path = self._path(artefact, device, threads)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_suffix(f".{os.getpid()}")
            written.write_bytes(msgspec.json.encode(speed))
            written.replace(path)
        except OSError as error:
            log.warning("the speed of this machine could not be kept in %s: %s", path, error)

    def _path(self, artefact: str, device: torch.device, threads: int | None) -> Path:
        machine = f"{_device_name(device)} {threads or 'best'}"
        digest = hashlib.blake2b(machine.encode(), digest_size=8).hexdigest()
        return self._directory / f"{artefact[:32]}-{digest}.json"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {platform.processor()} {os.cpu_count()}"


# ---------------------------------------------------------------- memory


class LayerSizes(msgspec.Struct, frozen=True):
    """Memory that the weights take."""

    layers: tuple[int, ...]
    first: int
    """What the peer with layer 0 holds besides."""
    last: int
    """What the peer with the last layer holds besides."""

    def spans_within(self, memory_bytes: int) -> list[Layers]:
        """From every layer on, what fits."""
        return spans_that_fit(self.layers, self.first, self.last, memory_bytes)


def layer_sizes(
    checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization | None, device: torch.device
) -> LayerSizes:
    """Worked out from the shapes in the model's config; no weight is read."""
    model = family.skeleton(checkpoint.config, dtype)
    plain = float(dtype.itemsize)
    packed = _bytes_a_weight(quantization.layers, device) if quantization else plain
    head = _bytes_a_weight(quantization.head, device) if quantization else plain
    table = _bytes_a_weight(ROWS, device) if quantization and quantization.embedding else plain
    names = {model.get_parameter(name) for name in family.packable(model)}
    layers = tuple(
        round(sum(weight.numel() * (packed if weight in names else plain) for weight in layer.parameters()))
        for layer in find_layers(model)
    )
    vocabulary = int(checkpoint.config.vocab_size) * int(checkpoint.config.hidden_size)
    return LayerSizes(layers, round(vocabulary * table), round(vocabulary * head))


def _bytes_a_weight(form: Form, device: torch.device) -> float:
    return form.pack(torch.zeros(TRIED, TRIED, device=device)).nbytes / TRIED**2
