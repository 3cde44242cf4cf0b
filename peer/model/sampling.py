"""Draw a token from logits, so that a replay on another peer draws the same one.

The draw depends on (seed, position) and the logits alone; the tokens so far matter only through penalties and
through a grammar, which says for each beginning what may follow.
There is no generator whose state could be lost with a peer: the random number is a hash of seed and position.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch

from peer.model.errors import BadLogits
from shared.protocol import Bias, Sampling

WIDTHS = (256, 8192)
"""Most draws fall on the likeliest tokens: sorting 128 000 takes 15 ms or more, finding 256 takes 0.3 ms."""


LOWEST_TEMPERATURE = 1e-5
"""Below it the likeliest token is certain, and the division would overflow in the end."""


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    position: int,
    history: Sequence[int],
    prompt_length: int,
    allowed: torch.Tensor | None = None,
) -> int:
    """The token at `position`, drawn from `logits` [vocab].

    `history` are the tokens so far, the first `prompt_length` of them the prompt; penalties alone look at it.
    Only tokens of the mask `allowed` [vocab] are drawn, if there is one. As in transformers, penalties and
    biases come first, then temperature, top-k, top-p and min-p. Raises BadLogits.
    """
    scores = logits.detach().to("cpu", torch.float64)
    highest = float(scores.max())
    if highest != highest or abs(highest) == float("inf"):
        raise BadLogits(
            f"the logits for position {position} hold {highest}: the model or its dtype is at fault"
        )
    if sampling.needs_history:
        scores = penalized(scores, sampling, history, prompt_length)
    if sampling.logit_bias:
        scores = biased(scores, sampling.logit_bias)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if sampling.temperature < LOWEST_TEMPERATURE:
        return int(scores.argmax())
    likelihoods = torch.softmax(scores / sampling.temperature, 0)
    return draw(likelihoods, sampling, uniform(sampling.seed, position))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one position of one seed, the same on every machine."""
    digest = hashlib.sha256(f"corolla-draw-1:{seed}:{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def penalized(
    scores: torch.Tensor, sampling: Sampling, history: Sequence[int], prompt_length: int
) -> torch.Tensor:
    """Scores [vocab] after the penalties: repetition counts all tokens so far, the others those generated."""
    scores = scores.clone()
    seen = torch.tensor(sorted(set(history)), dtype=torch.int64)
    known = scores[seen]
    scores[seen] = torch.where(
        known < 0, known * sampling.repetition_penalty, known / sampling.repetition_penalty
    )
    generated = Counter(history[prompt_length:])
    ids, counts = torch.tensor(list(generated.items()), dtype=torch.int64).reshape(-1, 2).unbind(1)
    scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return scores


def biased(scores: torch.Tensor, biases: Sequence[Bias]) -> torch.Tensor:
    """Scores [vocab] with the biases added. Those of tokens that the model does not have are left aside."""
    known = [bias for bias in biases if bias.token < scores.numel()]
    tokens = torch.tensor([bias.token for bias in known], dtype=torch.int64)
    return scores.index_add(0, tokens, torch.tensor([bias.add for bias in known], dtype=scores.dtype))


def draw(likelihoods: torch.Tensor, sampling: Sampling, u: float) -> int:
    """The token at the share `u` of what the filters leave of `likelihoods` [vocab], likeliest first.

    Each filter keeps a beginning of that order, so it is sorted only as far as the draw reaches.
    """
    vocab = likelihoods.numel()
    all_kept = min(sampling.top_k or vocab, vocab)
    widths = () if sampling.top_k else (width for width in WIDTHS if width < vocab)
    for width in (*widths, all_kept):
        order = likeliest(likelihoods, width)
        chances = likelihoods[order]
        if sampling.top_k:
            chances /= chances.sum()
        reached = chances.cumsum(0)
        end = count_kept(chances, reached, sampling)
        if end < width or width == all_kept:
            total = float(reached[end - 1])
        elif sampling.top_p == 1 and sampling.min_p == 0:
            total = 1.0
        else:
            continue
        drawn = int(torch.searchsorted(reached[:end], u * total, right=True))
        if drawn < end or width == all_kept:
            return int(order[min(drawn, end - 1)])
    raise AssertionError("the last width holds every token")


def likeliest(likelihoods: torch.Tensor, width: int) -> torch.Tensor:
    """The ids of the first `width` tokens, likeliest first, ties by id."""
    ids = (likelihoods >= likelihoods.topk(width).values[-1]).nonzero().flatten()
    return ids[likelihoods[ids].sort(descending=True, stable=True).indices][:width]


def count_kept(chances: torch.Tensor, reached: torch.Tensor, sampling: Sampling) -> int:
    """How many tokens top-p and min-p keep, from falling chances and the sums they reach; at least one."""
    before = reached - chances
    kept = (before < sampling.top_p) & (chances >= sampling.min_p * chances[0]) & (chances > 0)
    # A sum may waver in its last digit: what counts is where the filters first say no.
    return int(kept.to(torch.int8).cumprod(0).sum())
