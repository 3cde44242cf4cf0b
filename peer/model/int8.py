"""Weights as 8-bit numbers with one scale per output, for torch's own kernel: less memory at fp16's speed.

The kernel takes bfloat16 activations, which outliers do not harm as they harm 8-bit ones, and gives a row
the same bits alone and among a few others.
"""

from __future__ import annotations

import torch
from torch import nn

from peer.model.weights import Weights

MOST_ROWS = 8
"""Above it torch's kernel costs more per row than float32 products of weights made dense for the moment."""

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
    def pack(cls, weight: torch.Tensor) -> Int8:
        """Round to 127 steps on either side of zero: errors up to 1/250 of an output's largest weight."""
        outputs, inputs = weight.shape
        # The scale is rounded first, so that the numbers fit the scale that is kept.
        least, most = weight.aminmax(dim=1)
        scales = (torch.maximum(-least, most).float() / 127).clamp(min=1e-30).bfloat16()
        values = torch.zeros(outputs, -(-inputs // WIDTH) * WIDTH, dtype=torch.int8)
        # In pieces: what is divided and rounded takes four times the memory of what becomes of it.
        for start in range(0, outputs, 256):
            piece = slice(start, start + 256)
            rounded = (weight[piece] / scales[piece, None].float()).round_().clamp_(-127, 127)
            values[piece, :inputs] = rounded
        return cls(values, scales, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.inputs)
        result = self._multiply_many(rows.float()) if len(rows) > MOST_ROWS else self._multiply_few(rows)
        return result.view(*x.shape[:-1], self.outputs)

    def _multiply_few(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.bfloat16()
        if self._filling:
            rows = nn.functional.pad(rows, (0, self._filling))
        return torch._weight_int8pack_mm(rows, self._values, self._scales).float()

    def _multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        result = rows.new_empty(len(rows), self.outputs)
        outputs = max(1, PIECE // self.inputs)
        scratch = rows.new_empty(min(outputs, self.outputs), self.inputs)
        for start in range(0, self.outputs, outputs):
            piece = slice(start, start + outputs)
            dense = self._dense(piece, scratch)
            result[:, piece] = rows @ dense.T
        return result

    def _dense(self, piece: slice, into: torch.Tensor) -> torch.Tensor:
        values = self._values[piece, : self.inputs]
        return torch.mul(values, self._scales[piece, None].float(), out=into[: len(values)])

    def dense(self) -> torch.Tensor:
        return self._dense(slice(None), torch.empty(self.outputs, self.inputs))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self._values, "scales": self._scales}
