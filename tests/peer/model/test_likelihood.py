"""How likely a token was is what torch says of the logits, and nothing else changes it."""

from __future__ import annotations

import pytest
import torch

from peer.model.likelihood import LOWEST, likelihoods
from shared.protocol import Likelihood, decode, encode

LOGITS = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 4


def test_a_likelihood_is_the_logarithm_of_the_softmax() -> None:
    expected = torch.log_softmax(LOGITS.double(), 1)
    for row, told in enumerate(likelihoods(LOGITS, [4, 7, 9], 3)):
        assert told.token == [4, 7, 9][row]
        assert told.logprob == pytest.approx(float(expected[row, told.token]), abs=1e-6)
        best = expected[row].sort(descending=True)
        assert [token for token, _ in told.top] == best.indices[:3].tolist()
        assert [logprob for _, logprob in told.top] == pytest.approx(best.values[:3].tolist(), abs=1e-6)


def test_the_likeliest_token_is_exactly_as_likely_as_the_first_of_the_others() -> None:
    """lm-eval compares the two numbers to see whether a model would have said the same."""
    for told in likelihoods(LOGITS, LOGITS.argmax(1).tolist(), 1):
        assert told.top == [(told.token, told.logprob)]


def test_equally_likely_tokens_come_in_the_order_of_their_ids() -> None:
    (told,) = likelihoods(torch.zeros(1, 50), [0], 20)
    assert [token for token, _ in told.top] == list(range(20))


def test_what_is_next_to_impossible_can_be_told_on_the_wire() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 1] = -3e38
    (told,) = likelihoods(logits, [1], 4)
    assert told.logprob == LOWEST
    assert decode(encode(told), Likelihood) == told


def test_nobody_needs_to_ask_for_others() -> None:
    assert likelihoods(LOGITS[:1], [3], 0)[0].top == []
    assert len(likelihoods(torch.zeros(1, 4), [3], 20)[0].top) == 4
