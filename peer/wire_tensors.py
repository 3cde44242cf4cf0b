"""torch's tensors as the parts of a message, and back. Nothing malformed becomes a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from peer.model.errors import BadInputs
from shared.protocol import Part, Tensor, WireDtype
from shared.tensors import split_parts

FROM_WIRE: dict[WireDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
}
TO_WIRE = {dtype: name for name, dtype in FROM_WIRE.items()}


def pack(tensors: Mapping[str, torch.Tensor]) -> tuple[list[Part], bytes]:
    """Tensors as parts and their body. Raises BadInputs for numbers that are not finite."""
    parts: list[Part] = []
    pieces: list[memoryview] = []
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadInputs(f"{name} holds numbers that are not finite")
        parts.append(Part(name, Tensor(TO_WIRE[tensor.dtype], list(tensor.shape))))
        pieces.append(tensor.view(-1).view(torch.uint8).numpy().data)
    return parts, b"".join(pieces)


def unpack(parts: Sequence[Part], body: bytes | memoryview) -> dict[str, torch.Tensor]:
    """Parts as tensors. Raises ProtocolError for a wrong length, BadInputs where numbers are not finite."""
    return {name: _tensor(name, *found) for name, found in split_parts(parts, body).items()}


def _tensor(name: str, tensor: Tensor, data: memoryview) -> torch.Tensor:
    # A copy: torch wants memory that is its own and writable.
    raw: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(data, dtype=np.uint8).copy()
    made = torch.from_numpy(raw).view(FROM_WIRE[tensor.dtype]).view(tensor.shape)
    if made.is_floating_point() and not torch.isfinite(made).all():
        raise BadInputs(f"{name} holds numbers that are not finite")
    return made
