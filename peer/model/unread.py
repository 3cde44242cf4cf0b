"""Tensors of a checkpoint that are still in their files, for those who take them piece by piece.

transformers' loader stacks and joins the experts of a layer as whole tensors before it gives them away: in
float32 that is several times what becomes of them. `Unread` hears these operations and notes them, so that a
matrix, and of it some rows, can be read when they are wanted. Any other operation gets the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from peer.model.answering_tensor import AnsweringTensor
from peer.model.checkpoint import Checkpoint

PIECE = 500_000
"""Numbers that are read and rounded at once: 2 MB in float32."""


class Matrix(Protocol):
    """Anything of shape (outputs, inputs) whose rows can be had: a tensor, or one that is read on demand."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


def pieces(
    matrix: Matrix, *, numbers: int = PIECE, multiple: int = 16
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows after rows in float32, about so many numbers at a time, and a multiple of so many rows."""
    outputs, inputs = matrix.shape
    rows = max(1, numbers // max(1, inputs) // multiple) * multiple
    for start in range(0, outputs, rows):
        piece = slice(start, min(outputs, start + rows))
        yield piece, matrix[piece].float()


@dataclass(frozen=True)
class Stored:
    """Rows [start, start + rows) of a tensor of a checkpoint."""

    read_rows: Callable[[int, int], torch.Tensor]
    start: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, end, _ = rows.indices(self.rows)
        return self.read_rows(self.start + start, self.start + end)


@dataclass(frozen=True)
class Joined:
    """The rows of one matrix, and behind them those of another."""

    parts: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, end, _ = rows.indices(self.shape[0])
        found = []
        for part in self.parts:
            count = part.shape[0]
            if start < count and end > 0:
                found.append(part[max(0, start) : min(count, end)])
            start, end = start - count, end - count
        return found[0] if len(found) == 1 else torch.cat(found)


class Unread(AnsweringTensor):
    """A matrix, or one for each expert, that is still on disk. Takes no memory."""

    matrices: Sequence[Matrix]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], shape: Sequence[int], like: torch.Tensor | torch.dtype) -> Self:
        dtype = like if isinstance(like, torch.dtype) else like.dtype
        make: Callable[..., Self] = torch.Tensor._make_wrapper_subclass
        unread = make(cls, tuple(shape), dtype=dtype, device="cpu")
        unread.matrices = matrices
        return unread

    @classmethod
    def stored(cls, checkpoint: Checkpoint, name: str, read_rows: Callable[[int, int], torch.Tensor]) -> Self:
        """A tensor of two or three axes of a checkpoint."""
        tensor = checkpoint.tensor(name)
        *experts, rows, columns = tensor.shape
        count = experts[0] if experts else 1
        matrices = [Stored(read_rows, number * rows, rows, columns) for number in range(count)]
        return cls.of(matrices, tensor.shape, checkpoint.dtype_of(name))

    def dense(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The numbers, read into memory that is taken once."""
        whole = torch.empty(tuple(self.shape), dtype=self.dtype, device=device)
        for matrix, into in zip(self.matrices, whole if self.dim() == 3 else whole[None], strict=True):
            outputs, inputs = matrix.shape
            step = max(1, PIECE // max(1, inputs))
            for start in range(0, outputs, step):
                rows = slice(start, min(outputs, start + step))
                into[rows] = matrix[rows].to(device=device, dtype=self.dtype)
        return whole

    def __repr__(self, *_: object, **__: object) -> str:  # type: ignore[override]
        return f"Unread({list(self.shape)}, {self.dtype})"


def _all(tensor: Unread, index: object) -> Unread | None:
    return tensor if index is ... else None


def _to(tensor: Unread, *, device: object = None, dtype: torch.dtype | None = None) -> Unread:
    """As the loader says it. The device is for those who make numbers of it."""
    return Unread.of(tensor.matrices, tensor.shape, dtype or tensor.dtype)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> Unread | None:
    if dim != 0 or not all(isinstance(tensor, Unread) and tensor.dim() == 2 for tensor in tensors):
        return None
    matrices = [tensor.matrices[0] for tensor in tensors if isinstance(tensor, Unread)]
    return Unread.of(matrices, (len(tensors), *tensors[0].shape), tensors[0])


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> Unread | None:
    """One below the other, expert by expert."""
    unread = [tensor for tensor in tensors if isinstance(tensor, Unread)]
    if len(unread) < len(tensors) or any(dim % tensor.dim() != tensor.dim() - 2 for tensor in unread):
        return None
    if len({(tensor.dim(), len(tensor.matrices), tensor.shape[-1]) for tensor in unread}) > 1:
        return None
    matrices = [Joined(parts) for parts in zip(*(tensor.matrices for tensor in unread), strict=True)]
    rows = sum(tensor.shape[-2] for tensor in unread)
    return Unread.of(matrices, (*unread[0].shape[:-2], rows, unread[0].shape[-1]), unread[0])


Unread.answers = {
    torch.Tensor.__getitem__: _all,
    torch.Tensor.to: _to,
    torch.stack: _stack,
    torch.cat: _cat,
}
