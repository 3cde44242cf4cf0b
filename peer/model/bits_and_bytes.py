"""Weights that bitsandbytes keeps, 8 bits or 4 (nf4): for GPUs.

A CPU takes nf4 too, 4 to 17 times slower than float32.
"""

from __future__ import annotations

from typing import Any

import torch

from peer.model.unread import Matrix
from peer.model.weights import Weights

OUTLIER = 6.0
"""Activations beyond it are multiplied in 16 bits: LLM.int8()'s own threshold."""


def _library() -> Any:  # noqa: ANN401 - untyped there
    # Imported when it is asked for: it looks for GPU libraries, which takes a second.
    import bitsandbytes

    return bitsandbytes


class Nf4(Weights):
    """Four bits a number, in blocks of 64 with a float32 scale each. Relative error 9 %."""

    def __init__(self, matrix: Matrix) -> None:
        self.outputs, self.inputs = matrix.shape
        weight = matrix[:]
        functional = _library().functional
        self._values, self._state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _library().matmul_4bit(x, self._values.t(), quant_state=self._state)
        return result

    def dense(self) -> torch.Tensor:
        weight: torch.Tensor = _library().functional.dequantize_4bit(self._values, self._state)
        return weight

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self._values, "scales": self._state.absmax}


class LlmInt8(Weights):
    """Eight bits a number with one scale per output, activations in 8 bits but for outliers: LLM.int8()."""

    def __init__(self, matrix: Matrix) -> None:
        self.outputs, self.inputs = matrix.shape
        weight = matrix[:]
        self._dtype: torch.dtype = weight.dtype
        self._values, self._scales, _ = _library().functional.int8_vectorwise_quant(weight.half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        library = _library()
        state = library.MatmulLtState()
        state.CB, state.SCB = self._values, self._scales
        state.has_fp16_weights, state.threshold = False, OUTLIER
        result: torch.Tensor = library.matmul(x, self._values, state=state)
        return result

    def dense(self) -> torch.Tensor:
        weight = self._values.float() * (self._scales / 127)[:, None]
        dense: torch.Tensor = weight.to(self._dtype)
        return dense

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self._values, "scales": self._scales}
