"""Weights in float16, multiplied by our own C kernel: float32 activations, float32 in every sum.

Half the memory of float32, and so nearly twice its speed at one row; a dozen rows take hardly longer than
one. Relative error 2e-4. A row gives the same bits alone, among others, and on every processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from peer.model import native
from peer.model.errors import NoKernel
from peer.model.unread import Matrix, pieces
from peer.model.weights import Weights

LARGEST = torch.finfo(torch.float16).max
TILE = 32

Multiply = Callable[[int, int, int, int, int, int, int, int], None]


class Fp16(Weights):
    """`tiles` float16 [tiles, inputs, 32], as the kernel's source (`fp16.c`) describes it."""

    def __init__(self, multiply: Multiply, matrix: Matrix) -> None:
        self.outputs, self.inputs = matrix.shape
        self._multiply = multiply
        self._tiles = torch.empty(-(-self.outputs // TILE), self.inputs, TILE, dtype=torch.float16)
        for rows, piece in pieces(matrix, multiple=TILE):
            # Numbers beyond the range become the largest there is; infinity would spoil a whole row.
            halves = piece.clamp(-LARGEST, LARGEST).half()
            filled = functional.pad(halves, (0, 0, 0, -len(halves) % TILE)).view(-1, TILE, self.inputs)
            first = rows.start // TILE
            self._tiles[first : first + len(filled)] = filled.transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        rows = x.numel() // self.inputs
        result = x.new_empty(*x.shape[:-1], self.outputs)
        turned = torch.empty_like(x)
        self._multiply(
            self._tiles.data_ptr(),
            x.data_ptr(),
            rows,
            self.outputs,
            self.inputs,
            turned.data_ptr(),
            result.data_ptr(),
            torch.get_num_threads(),
        )
        return result

    def dense(self) -> torch.Tensor:
        rows = self._tiles.transpose(1, 2).reshape(-1, self.inputs)
        return rows[: self.outputs].float()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"tiles": self._tiles}


def kernel(directory: Path) -> Multiply:
    """The compiled product, built into `directory` if it is not there yet. Raises NoKernel."""
    library = native.library("fp16", directory)
    if not library.uses_threads():
        raise NoKernel("the C compiler on this machine has no OpenMP")
    address, number = ctypes.c_void_p, ctypes.c_int
    multiply = library.multiply_fp16
    multiply.argtypes = [address, address, number, number, number, address, address, number]
    multiply.restype = None
    return multiply
