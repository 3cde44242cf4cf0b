"""The one interface behind which weights sit, and the tensor that stands for them in a family's own code.

A family's layers say `linear(x, self.weight)`, `x @ self.weight.T`, `addmm(bias, x, self.weight)` or
`self.gate_up_proj[expert]`. `PackedWeight` is a tensor without memory of its own that hears these calls and
lets the packed weights answer them; so nn.Linear, transformers' Conv1D and fused experts stay as they are.
Any operation that it does not know gets the dense numbers: slow, and right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn

from peer.model.answering_tensor import AnsweringTensor
from peer.model.unread import Matrix, pieces


class Weights(ABC):
    """One matrix [outputs, inputs], in the form that is best for this machine."""

    outputs: int
    inputs: int

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., inputs] -> [..., outputs]. Has no gradient of its own; `multiply` gives it one."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The numbers that `forward` multiplies with, [outputs, inputs], in memory taken anew each time."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What this form keeps in memory, by name; empty where that is hidden in a library."""

    @property
    def nbytes(self) -> int:
        """Memory that the weights take."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class Rows(Weights):
    """An embedding: rows that are looked up, kept in float16 if their numbers allow it."""

    def __init__(self, matrix: Matrix) -> None:
        self.outputs, self.inputs = matrix.shape
        self._table = torch.empty(self.outputs, self.inputs, dtype=torch.float16)
        for rows, piece in pieces(matrix):
            if float(piece.abs().max()) > torch.finfo(torch.float16).max:
                self._table = matrix[:].float()
                break
            self._table[rows] = piece

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> float32 [..., inputs]."""
        return self._table[ids].float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self.dense().T

    def dense(self) -> torch.Tensor:
        return self._table.float()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"table": self._table}


class _Product(torch.autograd.Function):
    """Frozen weights: a gradient passes through them to `x`."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, weights: Weights) -> torch.Tensor:  # noqa: ANN401
        context.weights = weights
        return weights.forward(x)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        return gradients[0] @ context.weights.dense(), None


def multiply(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """[..., inputs] -> [..., outputs], with a gradient for `x` where one is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: torch.Tensor = _Product.apply(x, weights)  # type: ignore[no-untyped-call]
        return result
    return weights.forward(x)


class PackedWeight(AnsweringTensor):
    """Stands for a matrix, or for one matrix per expert, as a parameter of a family's module.

    Its shape is [outputs, inputs] or [experts, outputs, inputs]; `flipped`, the last two change places.
    """

    matrices: Sequence[Weights]
    flipped: bool

    # What torch.nn takes for a parameter, since it is one and cannot inherit from the class.
    _is_param = True

    @classmethod
    def of(
        cls,
        matrices: Sequence[Weights],
        shape: Sequence[int],
        like: torch.Tensor,
        *,
        flipped: bool = False,
    ) -> Self:
        """Packed matrices as a tensor of that shape; dtype, and device if it has one, are as `like`'s."""
        device = torch.device("cpu") if like.is_meta else like.device
        make: Callable[..., Self] = torch.Tensor._make_wrapper_subclass
        packed = make(cls, tuple(shape), dtype=like.dtype, device=device)
        packed.matrices = matrices
        packed.flipped = flipped
        return packed

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Memory that the weights take in their packed form."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def dense(self) -> torch.Tensor:
        """The numbers, in this tensor's shape and dtype."""
        matrices = [matrix.dense().T if self.flipped else matrix.dense() for matrix in self.matrices]
        return (torch.stack(matrices) if self.dim() == 3 else matrices[0]).to(self.dtype)

    def __repr__(self, *_: object, **__: object) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, {type(self.matrices[0]).__name__})"


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Answer:
    if not isinstance(weight, PackedWeight) or weight.dim() != 2 or weight.flipped:
        return None
    result = multiply(x, weight.matrices[0])
    return result if bias is None else result + bias


def _embedding(ids: torch.Tensor, weight: torch.Tensor, *_: object, **__: object) -> Answer:
    if not isinstance(weight, PackedWeight) or not isinstance(rows := weight.matrices[0], Rows):
        return None
    return rows.look_up(ids)


def _matmul(x: torch.Tensor, weight: torch.Tensor) -> Answer:
    if not isinstance(weight, PackedWeight) or not weight.flipped:
        return None
    if weight.dim() == 2:
        return multiply(x, weight.matrices[0])
    if x.dim() != 3:
        return None
    return torch.stack([multiply(rows, matrix) for rows, matrix in zip(x, weight.matrices, strict=True)])


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **scales: float) -> Answer:
    product = _matmul(x, weight) if not scales else None
    return product if product is None else product + bias


def _pick(weight: PackedWeight, index: object) -> Answer:
    if isinstance(index, torch.Tensor) and index.dim() == 0 and not index.is_floating_point():
        index = int(index)
    if weight.dim() != 3 or type(index) is not int:
        return None
    one = weight.matrices[index]
    return PackedWeight.of([one], weight.shape[1:], weight, flipped=weight.flipped)


def _flip(weight: PackedWeight) -> Answer:
    if weight.dim() != 2:
        return None
    return PackedWeight.of(weight.matrices, weight.shape[::-1], weight, flipped=not weight.flipped)


def _itself(weight: PackedWeight) -> Answer:
    return weight


Answer = torch.Tensor | None
"""What packed weights say to an operation; None when it is not one of theirs."""

PackedWeight.answers = {
    nn.functional.linear: _linear,
    nn.functional.embedding: _embedding,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.__getitem__: _pick,
    torch.Tensor.T.__get__: _flip,  # type: ignore[attr-defined]
    torch.Tensor.t: _flip,
    torch.Tensor.detach: _itself,
    torch.Tensor.data.__get__: _itself,  # type: ignore[attr-defined]
}
