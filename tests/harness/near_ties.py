"""Joined sessions and rounded weights: a token may differ only at a near tie of the two best logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

NEAR_TIE = 1e-3
"""Two logits so close may change places when sums are made in another order."""


def equal_but_for_near_ties(
    prompt: Sequence[int],
    got: Sequence[int],
    whole: Any,  # noqa: ANN401
    tie: float = NEAR_TIE,
) -> bool:
    """True when `got` is the greedy answer of the whole model, up to a place where its two best are a tie."""
    with torch.inference_mode():
        text = torch.tensor([[*prompt, *got]])
        logits = whole(input_ids=text).logits[0, len(prompt) - 1 : -1]
    for token, row in zip(got, logits, strict=True):
        if token != int(row.argmax()):
            return float(row.max() - row[token]) < tie
    return True
