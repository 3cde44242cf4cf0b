"""Whatever a step brings, it is computed or refused in one sentence, and the session can go on exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peer.model.errors import BadInputs, CacheFull
from peer.serving.batcher import choose
from peer.serving.compute import MOST_SCORED, Draw, Score, Work, compute_pass, row_bytes, wire_dtype
from shared.errors import CorollaError
from shared.protocol import MAX_CONTEXT, Sampling, Step, Tensor, WireDtype
from shared.tensors import ITEM_BYTES
from tests.peer.serving.parties import (
    HIDDEN,
    LAYERS,
    PROMPT,
    VOCABULARY,
    compute,
    expected_states,
    expected_tokens,
    ids_body,
    span,
    states_body,
    states_step,
    step,
    whole_model,
)

GREEDY = Draw(Sampling(), [], len(PROMPT))
HELD = 5
"""Positions in the cache before something odd comes."""


def tensors_equal(body: bytes, expected: torch.Tensor) -> None:
    got = torch.frombuffer(bytearray(body), dtype=torch.float32).view(-1, HIDDEN)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what a step gives


def test_the_whole_model_draws_what_transformers_draws() -> None:
    whole = span()
    cache = whole.new_cache(0, LAYERS, 40)

    computed = compute(whole, cache, step(0, len(PROMPT)), ids_body(PROMPT), GREEDY)

    assert [computed.token] == expected_tokens(tuple(PROMPT), 1)
    assert (computed.tensor, computed.body) == (None, b"")
    assert computed.computed_ms > 0


@pytest.mark.parametrize(("start", "end"), [(0, 2), (2, 4)])
def test_a_part_of_the_model_gives_the_hidden_states_of_transformers(start: int, end: int) -> None:
    part = span(start, end)
    cache = part.new_cache(start, end, 40)
    inputs = ids_body(PROMPT) if start == 0 else states_body(expected_states(tuple(PROMPT), start))
    asked = step(0, len(PROMPT)) if start == 0 else states_step(0, len(PROMPT))

    computed = compute(part, cache, asked, inputs, None)

    assert computed.token is None
    assert computed.tensor == Tensor("float32", [len(PROMPT), HIDDEN])
    assert len(computed.body) == len(PROMPT) * row_bytes(part) == len(PROMPT) * HIDDEN * 4
    tensors_equal(computed.body, expected_states(tuple(PROMPT), end))


def test_a_last_hop_that_is_not_asked_to_draw_draws_nothing() -> None:
    whole = span()
    computed = compute(whole, whole.new_cache(0, LAYERS, 40), step(0, 3), ids_body([1, 2, 3]), None)
    assert (computed.token, computed.tensor, computed.body) == (None, None, b"")


def test_the_prompt_is_scored_as_the_whole_model_would_score_it() -> None:
    whole = span()
    with torch.inference_mode():
        logits = whole_model()(input_ids=torch.tensor([PROMPT])).logits[0]
    expected = torch.log_softmax(logits, 1)
    following = PROMPT[1:]
    work = Work(
        whole.new_cache(0, LAYERS, 40),
        step(0, len(PROMPT)),
        ids_body(PROMPT),
        GREEDY,
        score=Score(following, 2),
    )

    compute_pass(whole, [(work, 3)])
    compute_pass(whole, [(work, work.left)])
    computed = work.result()

    assert [score.token for score in computed.scores] == following
    for place, score in enumerate(computed.scores):
        assert score.logprob == pytest.approx(float(expected[place, score.token]), abs=1e-4)
        assert [token for token, _ in score.top] == expected[place].topk(2).indices.tolist()
    assert [computed.token] == expected_tokens(tuple(PROMPT), 1)
    assert computed.likelihood is None


def test_a_prompt_that_is_scored_is_computed_in_small_pieces() -> None:
    whole = span()
    long = PROMPT * 30
    work = Work(
        whole.new_cache(0, LAYERS, 400), step(0, len(long)), ids_body(long), None, score=Score(long[1:], 0)
    )
    assert choose([work], 4 * MOST_SCORED) == [(work, MOST_SCORED)]


def test_hidden_states_travel_as_they_are_computed() -> None:
    assert wire_dtype(span(2, 4)) == "float32"


# ---------------------------------------------------------------- what it refuses


def refused(asked: Step, body: bytes, reason: str, *, start: int = 0) -> None:
    """The step is refused for this reason, and the session goes on to the reference's result."""
    part = span(2, 4) if start else span()
    cache = prepared(part)

    with pytest.raises(CorollaError, match=reason) as refusal:
        compute(part, cache, asked, body, None)

    assert isinstance(refusal.value, BadInputs | CacheFull)
    one_sentence(refusal.value)
    goes_on(part, cache, HELD)


def prepared(part: Any) -> Any:  # noqa: ANN401
    """A cache with the first `HELD` positions of the prompt."""
    cache = part.new_cache(part.start, part.end, 40)
    compute(part, cache, *good(part, 0, HELD), None)
    return cache


def good(part: Any, start: int, end: int) -> tuple[Step, bytes]:  # noqa: ANN401
    """The honest step with positions [start, end) of the prompt."""
    if part.start == 0:
        return step(start, end - start), ids_body(PROMPT[start:end])
    states = expected_states(tuple(PROMPT), part.start)[start:end]
    return states_step(start, end - start), states_body(states)


def goes_on(part: Any, cache: Any, position: int) -> None:  # noqa: ANN401
    """The rest of the prompt gives what the unsplit model gives."""
    last = part.end == LAYERS
    computed = compute(part, cache, *good(part, position, len(PROMPT)), GREEDY if last else None)
    if last:
        assert [computed.token] == expected_tokens(tuple(PROMPT), 1)
    else:
        tensors_equal(computed.body, expected_states(tuple(PROMPT), part.end)[position:])


def one_sentence(error: CorollaError) -> None:
    assert str(error) and "\n" not in str(error) and len(str(error)) < 900


@pytest.mark.parametrize(
    ("asked", "body", "reason"),
    [
        (step(5, 2), ids_body([1]), r"4 bytes of int32 \[2\] are not 2 positions"),
        (step(5, 2), ids_body([1, 2, 3]), r"12 bytes of int32 \[2\] are not 2 positions"),
        (step(5, 1), b"", "0 bytes"),
        (step(5, 2, shape=[3]), ids_body([1, 2, 3]), r"are not 2 positions"),
        (step(5, 1, shape=[]), ids_body([1]), r"are not 1 positions"),
        (step(5, 2, shape=[2, 1]), ids_body([1, 2]), r"token ids \[batch, count\]"),
        (step(5, 2, dtype="float32"), bytes(8), "token ids"),
        (step(5, 2, dtype="float16"), bytes(4), "token ids"),
        (step(5, 1), ids_body([VOCABULARY]), "outside of this model's vocabulary of 128"),
        (step(5, 1), ids_body([-1]), "outside of this model's vocabulary"),
        (step(5, 1), ids_body([-(1 << 31)]), "outside of this model's vocabulary"),
        (step(6, 1), ids_body([1]), "position 6 leaves a gap: the cache holds 5"),
        (step(5, 36), ids_body([1] * 36), "41 positions do not fit into a cache that was opened for 40"),
        (step(5, 1, shape=[1, 0]), b"", "0 bytes"),
        (step(5, 1, shape=[1, 0, 7]), b"", "0 bytes"),
        (states_step(5, 1), bytes(HIDDEN * 4), "token ids"),
    ],
)
def test_what_is_no_token_id_is_refused_by_the_first_hop(asked: Step, body: bytes, reason: str) -> None:
    refused(asked, body, reason)


@pytest.mark.parametrize(
    ("asked", "body", "reason"),
    [
        (states_step(5, 1), bytes(HIDDEN * 4 - 1), "255 bytes"),
        (states_step(5, 2), bytes(HIDDEN * 4), "are not 2 positions"),
        (step(5, 1, shape=[1, HIDDEN - 1], dtype="float32"), bytes(HIDDEN * 4 - 4), "takes hidden states"),
        (step(5, 1, shape=[1, HIDDEN], dtype="int32"), bytes(HIDDEN * 4), "takes hidden states"),
        (step(5, 1, shape=[1, 1, HIDDEN], dtype="float32"), bytes(HIDDEN * 4), "takes hidden states"),
        (step(5, 1, dtype="float32"), bytes(4), "takes hidden states"),
        (step(5, 1), ids_body([1]), "takes hidden states"),
        (step(5, 1, shape=[1, 0], dtype="float32"), b"", "0 bytes"),
    ],
)
def test_what_is_no_hidden_state_is_refused_by_a_later_hop(asked: Step, body: bytes, reason: str) -> None:
    refused(asked, body, reason, start=2)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_that_are_not_finite_are_refused(number: float, dtype: WireDtype) -> None:
    states = torch.zeros(2, HIDDEN, dtype=getattr(torch, dtype))
    states[1, 7] = number
    body = states.view(torch.uint8).numpy().tobytes()
    reason = "the hidden states hold numbers that are not finite"
    refused(step(5, 2, shape=[2, HIDDEN], dtype=dtype), body, reason, start=2)


def test_a_shape_whose_product_overflows_64_bits_is_refused() -> None:
    # 2^20 * 2^31 * 2^31 is 0 in 64 bits, which is the length of an empty body.
    huge = step(5, MAX_CONTEXT, shape=[MAX_CONTEXT, 1 << 31, 1 << 31])
    refused(huge, b"", "0 bytes")


# ---------------------------------------------------------------- any step


@st.composite
def odd_steps(draw: st.DrawFn) -> tuple[Step, bytes]:
    """Steps from honest to absurd; most are wrong in one place only."""
    count = draw(st.integers(1, 6) | st.sampled_from([36, 40, 41, MAX_CONTEXT]))
    rows = draw(st.just(count) | st.integers(0, 7))
    shape: Sequence[int] = draw(
        st.sampled_from([[rows], [rows, HIDDEN], [rows, HIDDEN - 1], [rows, 1, HIDDEN], [rows, 0], []])
        | st.lists(st.integers(0, 4) | st.integers(0, 1 << 31), max_size=3)
    )
    dtype: WireDtype = draw(st.sampled_from(["int32", "float32", "float16", "bfloat16"]))
    size = math.prod(shape) * ITEM_BYTES[dtype]
    length = size if size <= 1 << 16 else 0
    body = draw(
        st.binary(max_size=80)
        | st.sampled_from([b"\0", b"\x05\0\0\0", b"\x7f", b"\xff"]).map(lambda part: (part * length)[:length])
        | st.binary(min_size=min(length, 512), max_size=min(length, 512))
    )
    position = draw(st.integers(0, HELD) | st.integers(0, 50) | st.just(MAX_CONTEXT))
    return step(position, count, shape=shape, dtype=dtype, sample=draw(st.booleans())), body


draws = st.none() | st.builds(
    Draw,
    st.builds(
        Sampling,
        temperature=st.just(0.0) | st.floats(0.01, 100),
        top_k=st.integers(0, 1 << 40),
        top_p=st.floats(0.001, 1),
        min_p=st.floats(0, 1),
        seed=st.integers(-(1 << 63), (1 << 63) - 1),
        repetition_penalty=st.floats(0.01, 100),
        presence_penalty=st.floats(-100, 100),
        frequency_penalty=st.floats(-100, 100),
    ),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=8),
    st.integers(0, MAX_CONTEXT),
)


@pytest.mark.parametrize("start", [0, 2])
@settings(deadline=None, max_examples=60)
@given(odd=odd_steps(), drawing=draws)
@example(odd=(step(2, 3, shape=[3, 0, 0]), b""), drawing=None)
def test_any_step_is_answered_or_refused_and_the_session_goes_on(
    start: int, odd: tuple[Step, bytes], drawing: Draw | None
) -> None:
    part = span(2, 4) if start else span()
    cache = prepared(part)
    asked, body = odd

    try:
        computed = compute(part, cache, asked, body, drawing if part.end == LAYERS else None)
    except CorollaError as error:
        one_sentence(error)
    else:
        assert cache.length == asked.position + asked.count
        assert computed.token is None or 0 <= computed.token < VOCABULARY

    # A step may take positions back, but never changes those before it.
    goes_on(part, cache, min(HELD, asked.position))
