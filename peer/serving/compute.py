"""One step through a span, from wire bytes to wire bytes. Runs in the executor thread; knows no channels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from peer.model.errors import BadInputs
from peer.model.kv_cache import KVCache
from peer.model.sampling import sample
from peer.model.span import Span
from shared.protocol import Sampling, Step, Tensor, WireDtype
from shared.tensors import tensor_bytes

_FROM_WIRE: dict[WireDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
}
_TO_WIRE = {dtype: name for name, dtype in _FROM_WIRE.items()}


class Computed(msgspec.Struct, frozen=True):
    """What a step gave: hidden states for the next hop, or a token where the model ends."""

    tensor: Tensor | None
    body: bytes
    token: int | None
    started: float
    """`time.perf_counter()` when the computation began; only differences leave this machine."""
    computed_ms: float


class Draw(msgspec.Struct, frozen=True):
    """How the last hop draws a token from the logits."""

    sampling: Sampling
    history: Sequence[int]
    prompt_length: int


def compute(span: Span, cache: KVCache, step: Step, body: bytes | memoryview, draw: Draw | None) -> Computed:
    """Truncate the cache to the step's position, append its inputs, and return what comes out.

    Raises BadInputs when the inputs do not fit the span or are not finite numbers.
    """
    started = time.perf_counter()
    outputs = span.forward(_inputs(step, body), cache, step.position)
    token = None
    tensor, wire = None, b""
    if draw is not None:
        position = step.position + step.count
        token = sample(outputs[0], draw.sampling, position, draw.history, draw.prompt_length)
    elif cache.end < span.layer_count:
        tensor, wire = _to_wire(outputs[0])
    return Computed(tensor, wire, token, started, (time.perf_counter() - started) * 1000)


def row_bytes(span: Span) -> int:
    """Bytes of one position's hidden states on the wire, where they travel as computed, without rounding."""
    return span.hidden_size * torch.tensor([], dtype=span.dtype).element_size()


def wire_dtype(span: Span) -> WireDtype:
    """The format in which this span's hidden states travel."""
    return _TO_WIRE[span.dtype]


def _inputs(step: Step, body: bytes | memoryview) -> torch.Tensor:
    """[1, count] token ids or [1, count, hidden] hidden states; the span checks that they fit it."""
    dtype = _FROM_WIRE[step.tensor.dtype]
    if step.tensor.shape[:1] != [step.count] or not len(body) or len(body) != tensor_bytes(step.tensor):
        raise BadInputs(
            f"{len(body)} bytes of {step.tensor.dtype} {step.tensor.shape} are not {step.count} positions"
        )
    # A copy: torch wants memory that is its own and writable.
    raw: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(body, dtype=np.uint8).copy()
    inputs = torch.from_numpy(raw).view(dtype).view(1, *step.tensor.shape)
    if inputs.is_floating_point() and not torch.isfinite(inputs).all():
        raise BadInputs("the hidden states hold numbers that are not finite")
    return inputs


def _to_wire(hidden: torch.Tensor) -> tuple[Tensor, bytes]:
    hidden = hidden.detach().to("cpu").contiguous()
    if not torch.isfinite(hidden).all():
        raise BadInputs("the layers gave numbers that are not finite")
    wire = hidden.view(torch.uint8).numpy().tobytes()
    return Tensor(_TO_WIRE[hidden.dtype], list(hidden.shape)), wire
