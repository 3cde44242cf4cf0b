"""Runs of layers: how people write them, and what a set of them covers."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from shared.errors import SettingsError
from shared.spans import Span, coverage, gaps, layer_sums, parse_layers


@pytest.mark.parametrize(
    ("text", "span"),
    [("0:8", (0, 8)), ("8:", (8, 24)), (":8", (0, 8)), ("all", (0, 24)), ("1/3", (0, 8)), ("3/3", (16, 24))],
)
def test_layers_are_written_in_several_ways(text: str, span: tuple[int, int]) -> None:
    assert parse_layers(text, 24) == Span(*span)


@pytest.mark.parametrize("text", ["", "8", "a:b", "0:25", "8:8", "9:8", "-1:4", "0/3", "4/3", "1/0", "1:2:3"])
def test_anything_else_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(SettingsError, match="--layers"):
        parse_layers(text, 24)


@given(st.integers(1, 100), st.integers(1, 10))
def test_equal_parts_cover_every_layer_once(layer_count: int, parts: int) -> None:
    if parts > layer_count:
        return
    spans = [parse_layers(f"{part}/{parts}", layer_count) for part in range(1, parts + 1)]
    assert coverage(spans, layer_count) == [1] * layer_count
    assert gaps(coverage(spans, layer_count)) == []


def test_gaps_name_the_runs_that_nobody_holds() -> None:
    assert gaps(coverage([Span(0, 2), Span(4, 6)], 8)) == [Span(2, 4), Span(6, 8)]


def test_each_layer_has_the_sum_of_what_those_who_hold_it_are_worth() -> None:
    held = [(Span(0, 2), 1.5), (Span(1, 4), 2.0), (Span(3, 9), 0.25)]
    assert layer_sums(held, 5) == [1.5, 3.5, 2.0, 2.25, 0.25]
