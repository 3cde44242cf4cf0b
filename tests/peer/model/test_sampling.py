"""Draws follow transformers' filters, and depend on seed, position and logits alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given, settings
from transformers.generation import logits_process

from peer.model.errors import BadLogits
from peer.model.sampling import WIDTHS, draw, penalized, sample, uniform
from shared.protocol import Bias, Sampling

VOCAB = 400
"""More than the first width that a draw looks at."""

LOGITS = st.integers(0, 2**32 - 1).map(lambda seed: random_logits(seed))
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, 1, 3, 50, 300, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
)
HISTORIES = st.lists(st.integers(0, VOCAB - 1), max_size=30)


def random_logits(seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 4


def filters(sampling: Sampling) -> Iterator[Any]:
    """transformers' own processors for the same settings, in the order that `generate` applies them."""
    if sampling.repetition_penalty != 1:
        yield logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    yield logits_process.TemperatureLogitsWarper(sampling.temperature)
    if sampling.top_k:
        yield logits_process.TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1:
        yield logits_process.TopPLogitsWarper(sampling.top_p)
    if sampling.min_p > 0:
        yield logits_process.MinPLogitsWarper(sampling.min_p)


def kept_by_transformers(logits: torch.Tensor, sampling: Sampling, history: list[int]) -> torch.Tensor:
    """Probabilities [vocab] that transformers samples from."""
    scores = logits.double()[None]
    for apply in filters(sampling):
        scores = apply(torch.tensor([history], dtype=torch.int64), scores)
    return scores.softmax(1)[0]


# ---------------------------------------------------------------- against transformers


@settings(deadline=None)
@given(LOGITS, SAMPLINGS, HISTORIES, st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_inverse_of_transformers_distribution(
    logits: torch.Tensor, sampling: Sampling, history: list[int], u: float
) -> None:
    sampling = msgspec.structs.replace(sampling, presence_penalty=0.0, frequency_penalty=0.0)
    expected = kept_by_transformers(logits, sampling, history)
    scores = penalized(logits.double(), sampling, history, 0)

    token = draw(torch.softmax(scores / sampling.temperature, 0), sampling, u)

    before = float(expected[expected > expected[token]].sum())
    assert expected[token] > 0
    assert before - 1e-6 <= u <= before + float(expected[token]) + 1e-6


@settings(deadline=None)
@given(LOGITS, SAMPLINGS)
def test_every_kept_token_can_be_drawn_and_no_other(logits: torch.Tensor, sampling: Sampling) -> None:
    expected = kept_by_transformers(logits, msgspec.structs.replace(sampling, repetition_penalty=1.0), [])
    likelihoods = torch.softmax(logits.double() / sampling.temperature, 0)
    # The middle of each token's share; shares too thin to be hit are left out.
    order = expected.argsort(descending=True)
    middles = expected[order].cumsum(0) - expected[order] / 2
    thick = expected[order] > 1e-9

    drawn = [draw(likelihoods, sampling, float(u)) for u in middles[thick]]

    assert drawn == order[thick].tolist()


@settings(deadline=None)
@given(LOGITS, HISTORIES, st.integers(0, 30))
def test_presence_and_frequency_count_generated_tokens_only(
    logits: torch.Tensor, history: list[int], prompt_length: int
) -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.double().clone()
    for token, count in Counter(history[prompt_length:]).items():
        expected[token] -= 0.5 + 0.25 * count

    torch.testing.assert_close(penalized(logits.double(), sampling, history, prompt_length), expected)


# ---------------------------------------------------------------- what a draw depends on


@settings(deadline=None)
@given(LOGITS, SAMPLINGS, st.integers(0, 1 << 20), HISTORIES)
def test_a_replay_draws_the_same_token(
    logits: torch.Tensor, sampling: Sampling, position: int, history: list[int]
) -> None:
    first = sample(logits, sampling, position, history, 5)

    assert sample(logits.clone(), sampling, position, tuple(history), 5) == first
    if not sampling.needs_history:
        assert sample(logits, sampling, position, [], 0) == first


def test_seeds_and_positions_give_evenly_spread_numbers() -> None:
    numbers = sorted(uniform(seed, position) for seed, position in itertools.product(range(40), range(50)))

    assert len(set(numbers)) == 2000
    assert max(abs(number - rank / 2000) for rank, number in enumerate(numbers)) < 0.04


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampling = Sampling(temperature=1.0, seed=11)

    counts = Counter(sample(logits, sampling, position, [], 0) for position in range(4000))

    for token, probability in enumerate(logits.softmax(0).tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.025)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1, exclude_max=True), SAMPLINGS)
def test_looking_at_the_likeliest_first_changes_no_draw(seed: int, u: float, sampling: Sampling) -> None:
    likelihoods = torch.softmax(random_logits(seed, 3 * max(WIDTHS)).double() / sampling.temperature, 0)
    sampling = msgspec.structs.replace(sampling, top_k=0)
    everything = msgspec.structs.replace(sampling, top_k=likelihoods.numel())

    assert draw(likelihoods, sampling, u) == draw(likelihoods, everything, u)


# ---------------------------------------------------------------- edges


@settings(deadline=None)
@given(LOGITS)
def test_no_temperature_takes_the_likeliest(logits: torch.Tensor) -> None:
    assert sample(logits, Sampling(), 3, [], 0) == int(logits.argmax())


def test_equally_likely_tokens_are_taken_in_the_order_of_their_ids() -> None:
    level = torch.zeros(VOCAB)

    assert sample(level, Sampling(), 0, [], 0) == 0
    likelihoods = torch.softmax(level.double(), 0)
    assert [draw(likelihoods, Sampling(temperature=1), u) for u in (0.0, 0.501, 0.999)] == [0, 200, 399]
    assert draw(likelihoods, Sampling(temperature=1, top_k=2), 0.75) == 1


def test_a_penalty_may_change_the_likeliest() -> None:
    logits = torch.tensor([1.0, 2.0, 1.9])

    assert sample(logits, Sampling(repetition_penalty=1.2), 5, [1], 1) == 2
    assert sample(logits, Sampling(presence_penalty=0.2), 5, [1], 1) == 1
    assert sample(logits, Sampling(presence_penalty=0.2), 5, [0, 1], 1) == 2


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((VOCAB,), float("-inf"))
    logits[[7, 9]] = 1.0

    drawn = {sample(logits, Sampling(temperature=1.0), position, [], 0) for position in range(50)}

    assert drawn == {7, 9}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = torch.zeros(VOCAB)
    logits[3] = bad

    with pytest.raises(BadLogits, match="position 12"):
        sample(logits, Sampling(temperature=temperature), 12, [], 0)


def test_logits_that_forbid_every_token_are_refused() -> None:
    with pytest.raises(BadLogits):
        sample(torch.full((VOCAB,), float("-inf")), Sampling(), 0, [], 0)


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-6])
def test_a_temperature_of_almost_nothing_takes_the_likeliest_token(temperature: float) -> None:
    logits = random_logits(3)

    assert sample(logits, Sampling(temperature=temperature, seed=1), 5, [], 0) == int(logits.argmax())


# ---------------------------------------------------------------- biases and masks


def test_a_bias_is_added_to_its_token_alone() -> None:
    logits = random_logits(3)
    best, second = logits.sort(descending=True).indices[:2].tolist()
    assert sample(logits, Sampling(logit_bias=[Bias(second, 100)]), 0, [], 0) == second
    assert sample(logits, Sampling(logit_bias=[Bias(best, -100)]), 0, [], 0) == second
    assert sample(logits, Sampling(logit_bias=[Bias(VOCAB + 5, 100)]), 0, [], 0) == best


@settings(deadline=None)
@given(LOGITS, SAMPLINGS, st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=5))
def test_only_what_is_allowed_is_drawn(logits: torch.Tensor, sampling: Sampling, allowed: set[int]) -> None:
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[list(allowed)] = True
    assert sample(logits, sampling, 5, [], 0, mask) in allowed
