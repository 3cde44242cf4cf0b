"""How likely tokens are by the logits alone, before penalties, temperature and filters have their say."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peer.model.sampling import likeliest
from shared.protocol import Likelihood

LOWEST = -9999.0
"""No logarithm is told to be below this one; so the wire needs no word for minus infinity."""


def likelihoods(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Likelihood]:
    """How likely each token was by its row of `logits` [count, vocab], beside `top` of the likeliest."""
    return [_likelihood(row, token, top) for row, token in zip(logits, tokens, strict=True)]


def _likelihood(logits: torch.Tensor, token: int, top: int) -> Likelihood:
    logprobs = torch.log_softmax(logits.detach().double(), 0)
    found = likeliest(logprobs, min(top, logprobs.numel())) if top else torch.tensor([], dtype=torch.int64)
    told = logprobs[torch.cat([torch.tensor([token], device=found.device), found])].tolist()
    mine, *others = [round(max(logprob, LOWEST), 6) for logprob in told]
    return Likelihood(token, mine, list(zip(found.tolist(), others, strict=True)))
