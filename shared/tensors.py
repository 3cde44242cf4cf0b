"""How long a tensor's bytes must be, decided without torch, so that nothing malformed ever reaches torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from shared.errors import ProtocolError
from shared.protocol import MAX_BODY_BYTES, Part, Tensor

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


def tensor_bytes(tensor: Tensor) -> int:
    """The exact length of the body that this tensor describes."""
    return prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def check_tensor(tensor: Tensor, body: bytes | bytearray | memoryview) -> None:
    """Raise ProtocolError unless the body is exactly as long as the tensor says, and not over the cap."""
    expected = tensor_bytes(tensor)
    if expected > MAX_BODY_BYTES or len(body) != expected:
        raise ProtocolError(
            f"a {tensor.dtype} tensor of shape {tensor.shape} takes {expected} bytes, but {len(body)} came"
        )


def split_parts(parts: Sequence[Part], body: bytes | memoryview) -> dict[str, tuple[Tensor, memoryview]]:
    """Each part's tensor and its bytes. Raises ProtocolError unless the body holds exactly these."""
    expected = sum(tensor_bytes(part.tensor) for part in parts)
    if expected > MAX_BODY_BYTES or len(body) != expected:
        raise ProtocolError(f"{len(parts)} tensors take {expected} bytes, but {len(body)} came")
    found: dict[str, tuple[Tensor, memoryview]] = {}
    view, start = memoryview(body), 0
    for part in parts:
        end = start + tensor_bytes(part.tensor)
        if part.name in found:
            raise ProtocolError(f"two tensors are named {part.name}")
        found[part.name] = part.tensor, view[start:end]
        start = end
    return found
