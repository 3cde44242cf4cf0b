"""What a pass through layers may bring besides hidden states: masks, positions, deep prompts, an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Pair = tuple[torch.Tensor, torch.Tensor]
"""LoRA of one matrix: A [rank, inputs] and B [outputs, rank], its scale already in B."""


class Adapter:
    """LoRA of any matrices of a model, each by the path of its module."""

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        self.pairs = dict(pairs)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for pair in self.pairs.values() for tensor in pair)

    def apply(self, path: str, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """A module's output with what the adapter adds to it."""
        pair = self.pairs.get(path)
        if pair is None:
            return output
        down, up = pair
        added = (inputs.to(down.dtype) @ down.T) @ up.T
        return output + added.to(output.dtype)


@dataclass(frozen=True)
class Extras:
    """What comes with the hidden states [batch, count, width] of one pass."""

    mask: torch.Tensor | None = None
    """[batch, all positions so far]: 0 where nothing looks."""
    positions: torch.Tensor | None = None
    """[batch, count], where they are not the usual ones."""
    prompts: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """By layer, [length, width]: added at its entry, to the first positions of the text."""
    adapter: Adapter | None = None

    def enter(self, layer: int, hidden: torch.Tensor, position: int) -> torch.Tensor:
        """The hidden states, which begin at `position`, as the layer is to take them."""
        prompt = self.prompts.get(layer)
        count = hidden.shape[1]
        if prompt is None or position >= len(prompt):
            return hidden
        rows = prompt[position : position + count]
        rows = nn.functional.pad(rows, (0, 0, 0, count - len(rows)))
        return hidden + rows.to(hidden.device, hidden.dtype)


NOTHING = Extras()


def matrix_shape(part: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a module that multiplies with one matrix; None for others."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    if isinstance(part, Conv1D):
        return part.nx, part.nf
    return None
