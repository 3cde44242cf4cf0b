"""A session of a remote model, in the form in which transformers keeps keys and values."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import Cache

from peer.remote.carried import Carried
from peer.remote.chain import ChainSession
from peer.remote.layers import RemoteLayers

NOTHING = Carried()


class RemoteSession(Cache):
    """What peers keep of one batch. transformers' own `generate` takes it as its `past_key_values`.

    `position` may be set back: what follows replaces what was there.
    """

    is_croppable = True

    def __init__(self, layers: RemoteLayers, room: int, unseen: int = 0) -> None:
        super().__init__(layers=[])
        self._remote = layers
        self.room = room
        """The most positions that it will ever hold."""
        self._parts = [
            (start, ChainSession(layers.swarm.chain, start, end, room)) for start, end in layers.runs()
        ]
        self._unseen = unseen
        """Virtual tokens of a prompt before the text, which callers do not count."""
        self.inside = False
        """A forward pass runs: it counts all positions."""
        self._length = 0
        self._order: torch.Tensor | None = None
        self._batch = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free it at the peers. Another step would begin anew."""
        for _, part in self._parts:
            self._remote.swarm.loop.start(part.close())
        self._length = 0

    @property
    def position(self) -> int:
        """Positions of the text so far."""
        return max(0, self._length - self._unseen)

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise ValueError(f"a session of {self.position} positions cannot be set to {position}")
        self._length = position + self._unseen if position else 0

    def step(
        self, states: torch.Tensor, carried: Carried = NOTHING, *, each: bool = False
    ) -> list[torch.Tensor]:
        """Hidden states [batch, count, width] through the layers, appended to what is there: what comes out
        of the last one, or of `each`."""
        count = states.shape[1]
        if count == 0:
            return [states] * (len(self) if each else 1)
        if self._length + count > self.room:
            raise ValueError(
                f"{self._length + count} positions are more than the {self.room} of this session"
            )
        order, self._order = self._order, None
        behind: list[torch.Tensor] = []
        for start, part in self._parts:
            states = self._remote.enter(start, states)
            step = part.step(states.detach(), self._length, carried, order, each=each)
            found = [one.to(states.dtype) for one in self._remote.swarm.loop.run(step)]
            behind += found
            states = found[-1]
        self._length += count
        self._batch = len(states)
        return behind if each else [states]

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length if self.inside else self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back so many positions, given as a negative number; a positive one is a length to keep."""
        self.position = self.position + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """With the next step: these rows of the batch, in this order."""
        rows = beam_idx.cpu().long()
        self._order = rows if self._order is None else self._order[rows]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = self._batch if self._order is None else len(self._order)
        self.reorder_cache(torch.arange(batch).repeat_interleave(repeats))

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        raise TypeError("the layers that fill this cache are in a swarm")

    @property
    def is_initialized(self) -> bool:
        return self._length > 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_compileable(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self._remote)
