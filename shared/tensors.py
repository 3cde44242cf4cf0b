"""How long a tensor's bytes must be, decided without torch, so that nothing malformed ever reaches torch."""

from __future__ import annotations

from math import prod

from shared.errors import ProtocolError
from shared.protocol import MAX_BODY_BYTES, Tensor

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
