"""Weights as FBGEMM packs them: float16 in memory, float32 in every sum. x86 only, and without a compiler.

The same numbers as `fp16` multiplies, at two thirds of its speed, and in memory that is filled up more.
"""

from __future__ import annotations

import math

import torch

from peer.model.fp16 import LARGEST
from peer.model.unread import Matrix, pieces
from peer.model.weights import Weights

BLOCK = 512
"""Inputs that FBGEMM keeps together; the last block is filled up, and so takes more than was read."""

PART = 3 << 22
"""Numbers that FBGEMM packs as one matrix: while it does they are in memory in float32 as well. A row alone
takes 4 to 9 % longer through two parts, so the matrices of a layer of 1-billion models stay whole."""


def available() -> bool:
    """True where torch has FBGEMM's kernels and can use them."""
    return "x86" in torch.backends.quantized.supported_engines


class PackedFp16(Weights):
    """A matrix in FBGEMM's own layout. `dense` takes 0.1 s for 11 million weights: for training alone."""

    def __init__(self, matrix: Matrix) -> None:
        self.outputs, self.inputs = matrix.shape
        self._parts = [_pack(rows) for _, rows in pieces(matrix, numbers=PART, multiple=64)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See Weights. Bitwise the same for a row alone and among others."""
        x = x.float()
        results = [torch.ops.quantized.linear_dynamic_fp16(x, part) for part in self._parts]
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    def dense(self) -> torch.Tensor:
        return torch.cat([torch.ops.quantized.linear_unpack_fp16(part)[0].float() for part in self._parts])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    @property
    def nbytes(self) -> int:
        filled = (-(-size // block) * block for size, block in ((self.outputs, 16), (self.inputs, BLOCK)))
        return 2 * math.prod(filled)


def _pack(rows: torch.Tensor) -> object:
    # Beyond its range FBGEMM would saturate with a warning for each matrix; so do we, without.
    least, most = rows.aminmax()
    if max(-float(least), float(most)) > LARGEST:
        rows = rows.clamp(-LARGEST, LARGEST)
    return torch.ops.quantized.linear_prepack_fp16(rows.contiguous(), None)
