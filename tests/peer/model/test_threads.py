"""As many threads as are worth it, by the clock and not by the number of cores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

from peer.model.span import Span
from peer.model.threads import best, candidates, measure_threads
from tests.peer.model.families import LAYERS, tiny


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({1: 10.0}, 1),
        ({1: 10.0, 2: 5.2}, 2),
        ({1: 10.0, 2: 9.5}, 1),
        ({1: 10.0, 2: 6.0, 3: 5.6, 4: 5.0, 8: 4.9, 16: 30.0}, 4),
        ({1: 10.0, 2: 11.0, 4: 3.0}, 4),
    ],
)
def test_more_threads_must_be_worth_it(times: Mapping[int, float], chosen: int) -> None:
    assert best(times) == chosen


def test_few_numbers_are_tried_and_all_cores_are_among_them() -> None:
    assert candidates(1) == [1]
    assert candidates(2) == [1, 2]
    assert candidates(6) == [1, 2, 3, 4, 6]
    assert candidates(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert len(candidates(256)) < 20


@pytest.mark.parametrize("start", [0, 2])
def test_a_span_is_tried_and_torch_is_set(start: int, threads: None) -> None:
    span = Span.load(tiny("llama").checkpoint, start, LAYERS)
    chosen = measure_threads(span, 2)
    assert chosen in (1, 2)
    assert torch.get_num_threads() == chosen
