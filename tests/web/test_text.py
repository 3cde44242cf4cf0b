"""Text comes out in pieces, and the pieces are the text."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.harness.tokenizers import byte_fallback, byte_level
from web.text import BROKEN, LONGEST_WAIT, Detokenizer, StopStrings

BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text("a thein😀é€" + BROKEN)


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@settings(deadline=None)
@given(texts)
@example("  two spaces lead, three   inside  ")
@example("😀😀€é")
@example(BROKEN * 9)
def test_pieces_together_are_the_text(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        tokens = tokenizer.encode(text).ids
        assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


@settings(deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=40))
def test_pieces_are_the_text_even_when_a_model_draws_nonsense(tokens: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, tokens)) == BYTE_LEVEL.decode(tokens)


@settings(deadline=None)
@given(st.lists(st.integers(0, BYTE_FALLBACK.get_vocab_size() - 1), max_size=40))
def test_nonsense_in_bytes_never_stops_the_text(tokens: list[int]) -> None:
    pieces(BYTE_FALLBACK, tokens)


@settings(deadline=None)
@given(texts)
def test_no_piece_holds_half_a_character(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        told = pieces(tokenizer, tokenizer.encode(text).ids)
        assert sum(piece.count(BROKEN) for piece in told) == text.count(BROKEN)


@settings(deadline=None)
@given(texts.filter(lambda text: BROKEN not in text))
def test_a_character_comes_with_its_last_token(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text).ids
    told = ""
    detokenizer = Detokenizer(BYTE_LEVEL.decode)
    for count, token in enumerate(tokens, 1):
        told += detokenizer.push(token)
        so_far = BYTE_LEVEL.decode(tokens[:count])
        assert told == so_far or so_far.endswith(BROKEN)


def test_the_work_per_token_does_not_grow() -> None:
    decoded: list[int] = []

    def decode(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return BYTE_LEVEL.decode(tokens)

    detokenizer = Detokenizer(decode)  # type: ignore[arg-type]  # we always give lists
    for token in BYTE_LEVEL.encode("The petals of a flower 😀 make its corolla. " * 50).ids:
        detokenizer.push(token)
    assert max(decoded) < 20


def test_a_flood_of_broken_bytes_does_not_wait_for_ever() -> None:
    broken = BYTE_LEVEL.token_to_id("¡")  # byte 0xA1, which begins no character
    assert broken is not None
    assert any(pieces(BYTE_LEVEL, [broken] * LONGEST_WAIT)[:-1])


# ---------------------------------------------------------------- stop strings


def cut(text: str, stops: list[str]) -> str:
    """What must come out: characters one at a time, until a stop string is complete."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """A text in any pieces, and stop strings that are likely to be in it."""
    split = draw(st.lists(st.text("abc\n", max_size=4), max_size=12))
    stops = draw(st.lists(st.text("abc\n", max_size=4), max_size=4))
    return split, stops


@settings(deadline=None)
@given(split_texts())
@example((["abc"], ["abc", "b"]))
@example((["a", "ab", "ab"], ["abab", "b" * 3]))
def test_a_text_ends_before_its_first_stop_string_however_it_is_split(
    case: tuple[list[str], list[str]],
) -> None:
    split, stops = case
    cutter = StopStrings(stops)
    told = [*(cutter.push(piece) for piece in split), cutter.finish()]
    assert "".join(told) == cut("".join(split), stops)
    assert not any(stop and stop in "".join(told) for stop in stops)
    assert cutter.hit == (cut("".join(split), stops) != "".join(split))


@pytest.mark.parametrize("stops", [[], ["END"], ["x", "y"]])
def test_text_that_begins_no_stop_string_does_not_wait(stops: list[str]) -> None:
    assert StopStrings(stops).push("hello") == "hello"


def test_a_half_stop_string_waits_and_comes_when_it_is_none() -> None:
    cutter = StopStrings(["<end>"])
    assert [cutter.push("a<e"), cutter.push("nd"), cutter.push("!")] == ["a", "", "<end!"]
