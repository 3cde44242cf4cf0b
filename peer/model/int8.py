"""Weights as 8-bit numbers with one scale per output, for torch's own kernel: less memory at fp16's speed.

The kernel takes bfloat16 activations, which outliers do not harm as they harm 8-bit ones, and gives a row
the same bits alone and among others. Longer pieces of prompts are multiplied in another way, with the same
roundings: there, one number in a thousand may round to its neighbour.
"""

from __future__ import annotations

import torch
from torch import nn

from peer.model.unread import Matrix, pieces
from peer.model.weights import Weights

MOST_ROWS = 32
"""Far above it torch's kernel costs more than float32 products of weights made dense for the moment: twice as
much at 128 rows. They cross at 24 rows with AVX2 and at 64 with AVX-512."""

PIECE = 2_000_000
"""Numbers that are made dense at once: 8 MB stay in the processor's cache until they are multiplied with."""

WIDTH = 32
"""Inputs are filled up to a multiple: the kernel reads whole registers, and past the end of odd rows."""


class Int8(Weights):
    """`values` int8 [outputs, inputs filled up] and `scales` bfloat16 [outputs]."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, inputs: int) -> None:
        self.outputs, self.inputs = len(values), inputs
        self._filling = values.shape[1] - inputs
        self._values, self._scales = values, scales

    @classmethod
    def pack(cls, matrix: Matrix) -> Int8:
        """Round to 127 steps on either side of zero: errors up to 1/250 of an output's largest weight."""
        outputs, inputs = matrix.shape
        values = torch.zeros(outputs, -(-inputs // WIDTH) * WIDTH, dtype=torch.int8)
        scales = torch.empty(outputs, dtype=torch.bfloat16)
        for rows, piece in pieces(matrix):
            # The scale is rounded first, so that the numbers fit the scale that is kept.
            least, most = piece.aminmax(dim=1)
            scales[rows] = (torch.maximum(-least, most) / 127).clamp(min=1e-30)
            values[rows, :inputs] = (piece / scales[rows, None].float()).round_().clamp_(-127, 127)
        return cls(values, scales, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.inputs)
        rows = rows.bfloat16()
        result = self._multiply_many(rows) if len(rows) > MOST_ROWS else self._multiply_few(rows)
        return result.view(*x.shape[:-1], self.outputs)

    def _multiply_few(self, rows: torch.Tensor) -> torch.Tensor:
        if self._filling:
            rows = nn.functional.pad(rows, (0, self._filling))
        return torch._weight_int8pack_mm(rows, self._values, self._scales).float()

    def _multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.float()
        result = rows.new_empty(len(rows), self.outputs)
        outputs = max(1, PIECE // self.inputs)
        scratch = rows.new_empty(min(outputs, self.outputs), self.inputs)
        for start in range(0, self.outputs, outputs):
            piece = slice(start, start + outputs)
            dense = self._dense(piece, scratch)
            # Rounded as the kernel rounds: a row must not change with how many are beside it.
            result[:, piece] = (rows @ dense.T).bfloat16()
        return result

    def _dense(self, piece: slice, into: torch.Tensor) -> torch.Tensor:
        values = self._values[piece, : self.inputs]
        return torch.mul(values, self._scales[piece, None].float(), out=into[: len(values)])

    def dense(self) -> torch.Tensor:
        return self._dense(slice(None), torch.empty(self.outputs, self.inputs))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self._values, "scales": self._scales}
