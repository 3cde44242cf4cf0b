"""A session's keys and values: written in place, grown in steps, cut back at will."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from peer.model.errors import BadInputs, CacheFull
from peer.model.kv_cache import GROWTH, KVCache

HEADS, WIDTH = 2, 4


def append(cache: KVCache, values: torch.Tensor) -> list[torch.Tensor]:
    """One step of a model whose layers keep `values` [count]; gives what each layer is shown [shown]."""
    states = values[None, None, :, None].expand(1, HEADS, len(values), WIDTH)
    cache.check_room(1, len(values))
    shown = [cache.update(states, -states, layer) for layer in range(cache.start, cache.end)]
    cache.commit(1, len(values))
    assert all(torch.equal(keys, -values) for keys, values in shown)
    return [keys[0, 0, :, 0] for keys, _ in shown]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 300)), max_size=12))
def test_layers_are_shown_all_that_was_kept(steps: list[tuple[int, int]]) -> None:
    """Against a plain list. Each step takes some positions back and appends others."""
    cache = KVCache(2, 4, 5000, [None] * 6)
    kept: list[float] = []
    numbers = itertools.count(1.0)

    for back, count in steps:
        kept = kept[: max(0, len(kept) - back)]
        cache.truncate(len(kept))
        new = [next(numbers) for _ in range(count)]
        kept += new
        for shown in append(cache, torch.tensor(new)):
            assert shown.tolist() == kept
        assert cache.length == len(kept)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_a_sliding_layer_is_shown_its_window_and_the_new_positions(window: int, counts: list[int]) -> None:
    cache = KVCache(0, 2, 200, [None, window])
    length = 0

    for count in counts:
        shown_count, first = cache.get_mask_sizes(count, 1)
        everything, windowed = append(cache, torch.arange(length, length + count).float())
        length += count
        assert everything.tolist() == list(range(length))
        assert windowed.tolist() == list(range(first, length))
        assert len(windowed) == shown_count == min(length, window - 1 + count)


def test_a_window_can_be_taken_back() -> None:
    cache = KVCache(0, 1, 50, [4])
    append(cache, torch.arange(20.0))

    cache.truncate(10)

    assert append(cache, torch.tensor([99.0]))[0].tolist() == [7, 8, 9, 99]


def test_memory_grows_in_steps_up_to_the_capacity() -> None:
    cache = KVCache(0, 3, GROWTH + 100, [None] * 3)
    per_position = 3 * 2 * HEADS * WIDTH * 4
    assert cache.bytes == 0

    append(cache, torch.zeros(1))
    assert cache.bytes == GROWTH * per_position
    append(cache, torch.zeros(GROWTH))
    assert cache.bytes == (GROWTH + 100) * per_position


def test_a_full_cache_takes_no_more() -> None:
    cache = KVCache(0, 1, 5, [None])
    append(cache, torch.zeros(5))

    with pytest.raises(CacheFull, match="6 positions do not fit into a cache that was opened for 5"):
        append(cache, torch.zeros(1))


@pytest.mark.parametrize("position", [-1, 4])
def test_positions_that_are_not_held_cannot_be_truncated_to(position: int) -> None:
    cache = KVCache(0, 1, 5, [None])
    append(cache, torch.zeros(3))

    with pytest.raises(BadInputs, match="leaves a gap"):
        cache.truncate(position)
