"""The keys and values that one session keeps on a span, in buffers that grow in steps.

transformers' own cache joins tensors anew for every token: 58 ms per layer at 8 heads and 8000 tokens, where
writing into a buffer takes 0.1 ms. And its sliding-window layers forget, so nothing could be taken back.
Here each layer keeps every position; a sliding-window layer is only shown the last ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from peer.model.errors import BadInputs, CacheFull

GROWTH = 256
"""Positions by which the buffers grow. Each growth copies what is there, so a small step costs time."""


class LayerCache:
    """The keys and values of one layer, each [batch, heads, allocated, width] of which `length` are used."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory held by both buffers."""
        return sum(buffer.nbytes for buffer in (self._keys, self._values) if buffer is not None)

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, first: int, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [batch, heads, count, width] behind the last; show all from `first` on."""
        end = self.length + keys.shape[-2]
        self._keys = _with_room(self._keys, keys, self.length, end, capacity)
        self._values = _with_room(self._values, values, self.length, end, capacity)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, first:end], self._values[:, :, first:end]


def _with_room(
    buffer: torch.Tensor | None, new: torch.Tensor, length: int, needed: int, capacity: int
) -> torch.Tensor:
    if buffer is not None and needed <= buffer.shape[-2]:
        return buffer
    allocated = min(capacity, -(-needed // GROWTH) * GROWTH)
    batch, heads, _, width = new.shape
    grown = new.new_empty(batch, heads, allocated, width)
    if buffer is not None:
        grown[:, :, :length] = buffer[:, :, :length]
    return grown


class KVCache(Cache):
    """What one session keeps of layers [start, end): `length` positions out of `capacity`.

    `windows` tells for each layer of the whole model how many positions it may look back on, None for all.
    The layers of the family ask by their index in the whole model; those outside [start, end) are never asked
    to keep anything, but a family's forward may use any of them to learn the cache's length.
    """

    def __init__(self, start: int, end: int, capacity: int, windows: Sequence[int | None]) -> None:
        super().__init__(layers=[])
        self.start = start
        self.end = end
        self.capacity = capacity
        self.length = 0
        self._batch: int | None = None
        self.windows = windows
        self._kept = {layer: LayerCache() for layer in range(start, end)}
        self._sliding = [window is not None for window in windows]
        self._never = [False] * len(windows)

    @property
    def bytes(self) -> int:
        """Memory allocated so far."""
        return sum(kept.bytes for kept in self._kept.values())

    def bytes_of(self, layer: int) -> int:
        """Memory allocated so far for one layer, counted from 0 in the whole model."""
        return self._kept[layer].bytes

    def truncate(self, position: int) -> None:
        """Forget everything from `position` on."""
        if not 0 <= position <= self.length:
            raise BadInputs(
                f"a step at position {position} leaves a gap: the cache holds {self.length} positions"
            )
        self._mark(position)

    def check_room(self, batch: int, count: int) -> None:
        """Raise when `count` more positions of `batch` sequences do not fit."""
        if self._batch not in (None, batch):
            raise BadInputs(
                f"this session's cache holds a batch of {self._batch}, and the step brings {batch}"
            )
        if self.length + count > self.capacity:
            raise CacheFull(
                f"{self.length + count} positions do not fit into a cache that was opened for {self.capacity}"
            )

    def commit(self, batch: int, count: int) -> None:
        """All layers have appended `count` positions of `batch` sequences."""
        self._batch = batch
        self._mark(self.length + count)

    def _mark(self, length: int) -> None:
        self.length = length
        for kept in self._kept.values():
            kept.length = length

    # What follows is transformers' side: how a family's forward writes, and how it learns lengths and masks.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep one layer's new keys and values [batch, heads, count, width]; give what it may look at."""
        kept = self._kept[layer_idx]
        return kept.append(key_states, value_states, self._first_shown(layer_idx, kept.length), self.capacity)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions a layer holds."""
        kept = self._kept.get(layer_idx)
        return self.length if kept is None else kept.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many positions a layer will be shown with the next `query_length`, and the first of them."""
        length = self.get_seq_length(layer_idx)
        first = self._first_shown(layer_idx, length)
        return length + query_length - first, first

    def _first_shown(self, layer: int, length: int) -> int:
        window = self.windows[layer]
        return 0 if window is None else max(0, length - window + 1)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Like transformers' growing cache, this one tells no bound: the span watches the capacity."""
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    @property
    def is_sliding(self) -> list[bool]:
        return self._sliding

    @property
    def is_linear(self) -> list[bool]:
        return self._never

    @property
    def is_dummy(self) -> list[bool]:
        return self._never

    @property
    def is_compileable(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self.windows)
