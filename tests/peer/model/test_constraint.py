"""Under a grammar every token that is allowed leads on to a text that follows it; jsonschema is the judge."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer

from peer.model.constraint import Constraint, Grammars
from peer.model.errors import BadGrammar
from peer.model.sampling import sample
from shared.protocol import Sampling
from tests.harness.tokenizers import byte_fallback, byte_level, chat_files

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "petals": {"type": "integer", "minimum": 3, "maximum": 89},
        "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "petals", "colours"],
    "additionalProperties": False,
}
GRAMMAR = LLMatcher.grammar_from_json_schema(
    dict(SCHEMA), overrides={"whitespace_pattern": r"[\x20\x0A]{0,2}"}
)
STOP = 1


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    return made


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(chat_files(tokenizer), tokenizer.get_vocab_size() + 20)


def token_of(tokenizer: Tokenizer, text: str) -> int:
    token: int | None = tokenizer.token_to_id(text)
    assert token is not None
    return token


def drawn(constraint: Constraint, seed: int, vocab: int) -> list[int]:
    """Tokens up to the stop token, from logits that know nothing of JSON."""
    tokens: list[int] = []
    while len(tokens) < 400:
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed * 1000 + len(tokens)))
        allowed = constraint.allowed(tokens)
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=seed)
        token = sample(logits, sampling, len(tokens), tokens, 0, allowed)
        if token == STOP:
            return tokens
        tokens.append(token)
    raise AssertionError("the grammar never came to an end")


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_model_prefers_the_text_follows_the_schema(
    tokenizer: Tokenizer, grammars: Grammars, seed: int
) -> None:
    vocab = tokenizer.get_vocab_size() + 20
    tokens = drawn(grammars.constraint(GRAMMAR, [STOP]), seed, vocab)
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), SCHEMA)


def test_a_hop_that_takes_over_allows_what_the_lost_one_would_have_allowed(
    tokenizer: Tokenizer, grammars: Grammars
) -> None:
    first = grammars.constraint(GRAMMAR, [STOP])
    tokens = drawn(first, 7, tokenizer.get_vocab_size() + 20)
    for length in random.Random(0).sample(range(len(tokens)), 5):
        heir = grammars.constraint(GRAMMAR, [STOP])
        assert torch.equal(heir.allowed(tokens[:length]), first.allowed(tokens[:length]))


def test_an_answer_may_end_where_the_grammar_does_and_nowhere_else(
    tokenizer: Tokenizer, grammars: Grammars
) -> None:
    constraint = grammars.constraint(LLMatcher.grammar_from_regex("(yes|no)+"), [STOP, 2])
    ids = [token_of(tokenizer, letter) for letter in "yes"]
    assert [bool(constraint.allowed(ids[:count])[STOP]) for count in range(4)] == [False, False, False, True]
    assert constraint.allowed(ids)[2]


def test_a_grammar_that_makes_no_sense_is_refused_in_one_sentence(grammars: Grammars) -> None:
    for grammar in ("{", "start: nothing", '{"grammars":[{"json_schema":{"type":"rose"}}]}'):
        with pytest.raises(BadGrammar, match="cannot be used") as refused:
            grammars.constraint(grammar, [STOP])
        assert "\n" not in str(refused.value)


def test_tokens_that_do_not_follow_the_grammar_are_refused(tokenizer: Tokenizer, grammars: Grammars) -> None:
    with pytest.raises(BadGrammar, match="do not follow"):
        grammars.constraint(GRAMMAR, [STOP]).allowed([token_of(tokenizer, "a")])


def test_an_end_without_a_stop_token_is_an_error_and_no_endless_text(
    tokenizer: Tokenizer, grammars: Grammars
) -> None:
    constraint = grammars.constraint(LLMatcher.grammar_from_regex("a"), [])
    with pytest.raises(BadGrammar, match="no stop token"):
        constraint.allowed([token_of(tokenizer, "a")])


def test_a_model_without_a_usable_tokenizer_says_so() -> None:
    with pytest.raises(BadGrammar, match="tokenizer cannot be used with grammars"):
        Grammars({"tokenizer.json": b"{}"}, 100).constraint(GRAMMAR, [STOP])
