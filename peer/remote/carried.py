"""What travels with hidden states through the layers of others: masks, positions, prompts, LoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from peer.model.extras import Pair
from peer.serving.passes import PROMPT
from peer.wire_tensors import pack
from shared.protocol import Part


@dataclass(frozen=True)
class Loan:
    """Matrices of an adapter as they are lent to a peer."""

    adapter: str
    parts: list[Part]
    body: bytes


@dataclass(frozen=True)
class Carried:
    """Of one pass through the model. The tensors are detached: gradients come back by name."""

    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    prompts: Mapping[int, torch.Tensor] = field(default_factory=dict)
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    layer_of: Mapping[str, int] = field(default_factory=dict)
    """In which layer each matrix of `pairs` is."""
    hosted: str = ""
    """The id of an adapter that peers host."""
    _loans: dict[tuple[int, int], Loan | None] = field(default_factory=dict)

    def rows(self, chosen: slice) -> Carried:
        """For some rows of the batch."""
        return replace(
            self,
            mask=None if self.mask is None else self.mask[chosen],
            positions=None if self.positions is None else self.positions[chosen],
        )

    def tensors(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """What a request for layers [start, end) brings, besides hidden states and the adapter."""
        found = {f"{PROMPT}{layer}": prompt for layer, prompt in self.prompts.items() if start <= layer < end}
        if self.mask is not None:
            found["mask"] = self.mask.to(torch.int32)
        if self.positions is not None:
            found["positions"] = self.positions.to(torch.int32)
        return found

    def loan(self, start: int, end: int) -> Loan | None:
        """The matrices of layers [start, end), named by a hash over them; None when there are none."""
        key = start, end
        if key not in self._loans:
            mine = {path: pair for path, pair in self.pairs.items() if start <= self.layer_of[path] < end}
            self._loans[key] = _loan(mine) if mine else None
        return self._loans[key]


def _loan(pairs: Mapping[str, Pair]) -> Loan:
    parts, body = pack(
        {
            f"{path}.{side}": matrix
            for path, pair in pairs.items()
            for side, matrix in zip("AB", pair, strict=True)
        }
    )
    digest = hashlib.sha256(repr([(part.name, part.tensor.shape) for part in parts]).encode())
    digest.update(body)
    return Loan(digest.hexdigest(), parts, body)
