"""Three spans of any family compute what transformers computes in one piece."""

from __future__ import annotations

import pytest
import torch

from peer.model.span import Span
from tests.peer.model.families import CAPACITY, LAYERS, VOCAB, Tiny, every_family, random_tokens, tiny

LENGTH = 24
"""Three times the sliding window of the families that have one."""


@pytest.fixture(params=every_family())
def model(request: pytest.FixtureRequest) -> Tiny:
    torch.manual_seed(1)
    return tiny(request.param)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_whole_prompt_gives_the_same_logits(model: Tiny) -> None:
    tokens = random_tokens(2, LENGTH)

    logits = model.run(model.caches(), tokens, 0)

    assert logits.shape == (2, LENGTH, VOCAB)
    close(logits, model.expected(tokens))


def test_a_prompt_in_chunks_and_single_tokens_give_the_same_logits(model: Tiny) -> None:
    tokens = random_tokens(1, LENGTH)
    caches = model.caches()
    ends = [7, 15, *range(16, LENGTH + 1)]

    pieces = [
        model.run(caches, tokens[:, start:end], start) for start, end in zip([0, *ends], ends, strict=False)
    ]

    close(torch.cat(pieces, 1), model.expected(tokens))


def test_positions_taken_back_leave_no_trace(model: Tiny) -> None:
    tokens = random_tokens(1, LENGTH)
    expected = model.expected(tokens)
    caches = model.caches()
    model.run(caches, tokens[:, :18], 0)
    model.run(caches, random_tokens(1, 5), 18)

    close(model.run(caches, tokens[:, 18:20], 18), expected[:, 18:20])
    model.run(caches, random_tokens(1, 1), 3)
    close(model.run(caches, tokens[:, 3:], 3), expected[:, 3:])


def test_greedy_tokens_equal_those_of_generate(model: Tiny) -> None:
    prompt = random_tokens(1, 12)
    expected = model.whole.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    caches = model.caches()
    inputs, position, tokens = prompt, 0, []

    for _ in range(12):
        logits = model.run(caches, inputs, position, all_logits=False)
        position += inputs.shape[1]
        inputs = logits.argmax(1, keepdim=True)
        tokens.append(int(inputs))

    assert tokens == expected[0, 12:].tolist()


def test_a_session_may_use_any_part_of_a_span(model: Tiny) -> None:
    tokens = random_tokens(1, LENGTH)
    whole = Span.load(model.checkpoint, 0, LAYERS)
    caches = [whole.new_cache(start, end, CAPACITY) for start, end in ((0, 2), (2, 3), (3, LAYERS))]
    pieces = []

    for start, end in ((0, 10), (10, 11), (11, LENGTH)):
        states = tokens[:, start:end]
        for cache in caches:
            states = whole.forward(states, cache, start, all_logits=True)
        pieces.append(states)

    close(torch.cat(pieces, 1), model.expected(tokens))


def gradient(output: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of one number made from the output, to the inputs."""
    (found,) = torch.autograd.grad((output * weights).sum(), inputs)
    return found


def test_gradients_flow_back_through_the_spans_as_through_the_model(model: Tiny) -> None:
    """To the hidden states between the layers, which is what a span hands back to the one before it."""
    tokens = random_tokens(2, 12)
    whole = model.whole(tokens, output_hidden_states=True, use_cache=False)
    start = model.spans[1].start
    inside = whole.hidden_states[start]
    weights = torch.randn(whole.logits.shape)
    expected = gradient(whole.logits, inside, weights)

    arriving = inside.detach().requires_grad_()
    states = arriving
    for span in model.spans[1:]:
        states = span.differentiable(states, span.start, span.end)

    close(states, whole.logits)
    torch.testing.assert_close(gradient(states, arriving, weights), expected, rtol=1e-4, atol=1e-5)
