"""A session's keys and values: written in place, grown in steps, cut back at will."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from peer.model.errors import BadInputs, CacheFull
from peer.model.kv_cache import GROWTH, Int8Buffer, KVCache

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


def test_a_long_cache_grows_in_longer_steps() -> None:
    """Each growth copies everything, so there must be few of them."""
    cache = KVCache(0, 1, 40_000, [None])
    sizes = []
    for _ in range(40):
        append(cache, torch.zeros(1000))
        sizes.append(cache.bytes)
    assert len(set(sizes[20:])) < 10
    assert cache.bytes == 40_000 * 2 * HEADS * WIDTH * 4


# ---------------------------------------------------------------- copies


def test_a_copy_has_the_first_positions_and_memory_of_its_own() -> None:
    cache = KVCache(0, 2, 50, [None, 4])
    append(cache, torch.arange(20.0))

    other = cache.copy(12, 30)
    append(cache, torch.tensor([77.0]))
    everything, windowed = append(other, torch.tensor([99.0]))

    assert everything.tolist() == [*range(12), 99]
    assert windowed.tolist() == [9, 10, 11, 99]
    assert (cache.length, other.length, other.capacity) == (21, 13, 30)
    with pytest.raises(BadInputs, match="a batch of 1"):
        other.check_room(2, 1)


def test_a_cache_that_must_be_smaller_gives_memory_back() -> None:
    cache = KVCache(0, 1, 1000, [None])
    append(cache, torch.arange(300.0))
    assert cache.bytes == 2 * GROWTH * 2 * HEADS * WIDTH * 4

    cache.resize(100)

    assert cache.bytes == 100 * 2 * HEADS * WIDTH * 4
    with pytest.raises(CacheFull):
        append(cache, torch.zeros(1))
    cache.truncate(50)
    assert append(cache, torch.tensor([7.0]))[0].tolist() == [*range(50), 7]


# ---------------------------------------------------------------- eight bits


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_eight_bits_keep_each_row_to_a_part_of_its_largest_number(seed: int, size: float) -> None:
    numbers = torch.Generator().manual_seed(seed)
    states = torch.randn(1, HEADS, 30, 64, generator=numbers) * size
    states[0, 0, 3] = 0
    cache = KVCache(0, 1, 40, [None], buffer=Int8Buffer)

    shown, _ = cache.update(states, states, 0)

    largest = states.abs().amax(-1, keepdim=True)
    assert ((shown - states).abs() <= largest * (1 / 254 + 1e-6)).all()
    assert shown.dtype == states.dtype


def test_eight_bits_take_a_quarter_of_the_memory() -> None:
    plain = KVCache(0, 1, 256, [None])
    small = KVCache(0, 1, 256, [None], buffer=Int8Buffer)
    for cache in (plain, small):
        cache.update(torch.zeros(1, HEADS, 256, 128), torch.zeros(1, HEADS, 256, 128), 0)
    assert small.bytes == plain.bytes * (128 + 4) / (4 * 128)


def test_copies_in_eight_bits_are_equal_and_fit() -> None:
    cache = KVCache(0, 1, 50, [None], buffer=Int8Buffer)
    states = torch.randn(1, HEADS, 20, WIDTH)
    shown, _ = cache.update(states, states, 0)
    cache.commit(1, 20)

    other = cache.copy(12, 30)
    other.resize(12)
    other.truncate(11)
    again, _ = other.update(states[:, :, 11:12], states[:, :, 11:12], 0)

    assert torch.equal(again, shown[:, :, :12])
