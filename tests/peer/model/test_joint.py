"""Several sessions in one forward pass compute what each would compute alone, in any family."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from peer.model.checkpoint import Checkpoint, open_checkpoint
from peer.model.errors import BadInputs, CacheFull
from peer.model.kv_cache import KVCache
from peer.model.span import Row, Span
from tests.peer.model.families import (
    CAPACITY,
    LAYERS,
    NAMED,
    VOCAB,
    Tiny,
    config_of,
    every_family,
    random_model,
    random_tokens,
    save,
    tiny,
)
from tests.peer.model.quantizations import FAST, quantization

LENGTH = 24
HELD = (0, 3, 11, 12, 17)
"""Positions that five sessions hold when they meet; the sliding windows are 8 long."""
PIECES = (6, 1, 1, 9, 1)
"""What each then brings: beginnings and pieces of prompts among single tokens."""

ONE_BY_ONE = {
    "bloom",
    "codegen",
    "diffllama",
    "falcon-40b",
    "falcon-7b",
    "falcon-alibi",
    "gpt-j",
    "gpt-neo",
    "llama4",
    "mpt",
    "xglm",
}
"""Families whose attention is their own, or whose masks are."""


@pytest.fixture(params=every_family())
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def model(family: str) -> Tiny:
    torch.manual_seed(2)
    return tiny(family)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def together(
    spans: Sequence[Span],
    sessions: Sequence[Sequence[KVCache]],
    inputs: Sequence[torch.Tensor],
    positions: Sequence[int],
) -> list[torch.Tensor | None]:
    """The inputs of each session through all spans, each span computing all sessions as one."""
    states: list[torch.Tensor | None] = list(inputs)
    for index, span in enumerate(spans):
        rows = [
            span.row(state, caches[index], position)
            for state, caches, position in zip(states, sessions, positions, strict=True)
            if state is not None
        ]
        states = span.forward_rows(rows)
    return [state if state is None else state[:, -1] for state in states]


def test_it_is_found_out_which_families_can_be_joined(family: str, model: Tiny) -> None:
    assert {span.joins_sessions for span in model.spans} == {family not in ONE_BY_ONE}


def test_sessions_at_different_positions_get_the_logits_of_the_whole_model(model: Tiny) -> None:
    texts = [random_tokens(1, LENGTH + 4) for _ in HELD]
    sessions = [model.caches() for _ in HELD]
    for text, caches, held in zip(texts, sessions, HELD, strict=True):
        if held:
            model.run(caches, text[:, :held], 0)
    positions = list(HELD)

    for counts in (PIECES, (1,) * 5, (1, 2, 1, 1, 3)):
        ends = [position + count for position, count in zip(positions, counts, strict=True)]
        inputs = [text[:, start:end] for text, start, end in zip(texts, positions, ends, strict=True)]
        logits = together(model.spans, sessions, inputs, positions)
        for text, end, mine in zip(texts, ends, logits, strict=True):
            assert mine is not None
            close(mine, model.expected(text[:, :end])[:, -1])
        positions = ends


def test_positions_taken_back_in_company_leave_no_trace(model: Tiny) -> None:
    texts = [random_tokens(1, LENGTH) for _ in range(2)]
    sessions = [model.caches() for _ in texts]
    together(model.spans, sessions, [text[:, :12] for text in texts], [0, 0])
    together(model.spans, sessions, [random_tokens(1, 5), random_tokens(1, 1)], [12, 9])

    logits = together(model.spans, sessions, [texts[0][:, 12:15], texts[1][:, 4:15]], [12, 4])

    for text, mine in zip(texts, logits, strict=True):
        assert mine is not None
        close(mine, model.expected(text[:, :15])[:, -1])


# ---------------------------------------------------------------- one family is enough for the rest


@pytest.fixture
def llama() -> Span:
    return Span.load(tiny("llama").checkpoint, 0, LAYERS)


def test_a_row_gets_the_logits_it_wants_and_is_kept_all_the_same(llama: Span) -> None:
    text = random_tokens(1, 10)
    caches = [llama.new_cache(0, LAYERS, CAPACITY) for _ in range(2)]
    rows = [
        llama.row(text[:, :9], cache, 0, wanted=wanted) for cache, wanted in zip(caches, (0, 3), strict=True)
    ]

    without, with_logits = llama.forward_rows(rows)
    assert without is None and with_logits is not None
    close(with_logits, tiny("llama").expected(text[:, :9])[:, -3:])
    assert llama.forward_rows([llama.row(text[:, :1], caches[1], 9, wanted=0)]) == [None]

    close(llama.forward(text[:, 9:], caches[0], 9), tiny("llama").expected(text)[:, -1])


def test_a_mistake_shows_before_the_pass_and_only_at_its_own_session(llama: Span) -> None:
    cache = llama.new_cache(0, LAYERS, 4)
    with pytest.raises(BadInputs, match="vocabulary"):
        llama.row(torch.tensor([[VOCAB]]), cache, 0)
    with pytest.raises(BadInputs, match="leaves a gap"):
        llama.row(torch.tensor([[1]]), cache, 1)
    with pytest.raises(CacheFull, match="5 positions do not fit"):
        llama.row(random_tokens(1, 5), cache, 0)


def test_rows_of_different_layers_are_no_pass(llama: Span) -> None:
    rows = [llama.row(random_tokens(1, 1), llama.new_cache(0, end, CAPACITY), 0) for end in (2, LAYERS)]
    with pytest.raises(ValueError, match="the same layers"):
        llama.forward_rows(rows)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_follow_the_longest_session_are_computed_one_by_one(kind: str) -> None:
    model = tiny(f"llama-{kind}")
    assert not any(span.joins_sessions for span in model.spans)


# ---------------------------------------------------------------- packed weights


@pytest.mark.parametrize("name", FAST)
def test_with_packed_weights_a_token_costs_the_same_bits_alone_and_among_twenty(name: str) -> None:
    """At each of three steps the logits of every session equal those of its twin, which is alone."""
    span = Span.load(wide(), 0, 2, quantization=quantization(name))
    texts = [random_tokens(1, 3 * number + 5) for number in range(20)]
    company, alone = ([span.new_cache(0, 2, 80) for _ in texts] for _ in range(2))
    for text, one, other in zip(texts, company, alone, strict=True):
        for cache in (one, other):
            span.forward(text[:, :-3], cache, 0)

    for back in (3, 2, 1):
        inputs = [text[:, text.shape[1] - back].unsqueeze(1) for text in texts]
        together = span.forward_rows([row(span, *pair) for pair in zip(inputs, company, strict=True)])
        for token, cache, mine in zip(inputs, alone, together, strict=True):
            (expected,) = span.forward_rows([row(span, token, cache)])
            assert expected is not None and mine is not None and torch.equal(mine, expected)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("family", ["llama", "deepseek-v3", "mixtral"])
def test_rounded_activations_do_not_keep_sessions_apart(family: str, name: str) -> None:
    assert Span.load(tiny(family).checkpoint, 0, LAYERS, quantization=quantization(name)).joins_sessions


@functools.cache
def wide() -> Checkpoint:
    """Rows long enough that sums made in another order would differ, and would change roundings."""
    directory = Path(tempfile.mkdtemp(prefix="corolla-wide-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    torch.manual_seed(4)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    save(random_model(config_of("llama", **sizes, **heads, vocab_size=VOCAB)), directory)
    return open_checkpoint(str(directory))


def row(span: Span, inputs: torch.Tensor, cache: KVCache) -> Row:
    return span.row(inputs, cache, cache.length)


# ---------------------------------------------------------------- eight bits


@pytest.mark.parametrize("family", NAMED)
def test_eight_bit_caches_give_the_same_alone_and_together_and_nearly_what_the_model_gives(
    family: str,
) -> None:
    model = tiny(family)
    torch.manual_seed(3)
    held = Span.load(model.checkpoint, 0, LAYERS, int8_kv=True)
    texts = [random_tokens(1, 20) for _ in range(3)]
    alone = [held.new_cache(0, LAYERS, CAPACITY) for _ in texts]
    company = [[held.new_cache(0, LAYERS, CAPACITY)] for _ in texts]
    for text, cache in zip(texts, alone, strict=True):
        held.forward(text[:, :17], cache, 0)
    together([held], company, [text[:, :17] for text in texts], [0] * 3)

    for position in (17, 18, 19):
        inputs = [text[:, position : position + 1] for text in texts]
        joined = together([held], company, inputs, [position] * 3)
        for text, cache, one, mine in zip(texts, alone, inputs, joined, strict=True):
            assert mine is not None
            expected = model.expected(text[:, : position + 1])[:, -1]
            assert (held.forward(one, cache, position) - expected).norm() < 0.03 * expected.norm()
            assert (mine - expected).norm() < 0.03 * expected.norm()
