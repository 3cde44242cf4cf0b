"""Several sessions in one forward pass: their positions side by side, each looking at its own session alone.

The linear layers see one long row of positions, so each weight is read once for all sessions. Where positions
look at each other, in attention, the row is taken apart: keys and values go to the session's own cache, and
each session's queries are computed against it. On a CPU this was faster than slots with a mask (2.9 to 2.6
times one by one, at four sessions) and than gathering pages (2.3), and nothing is padded.

transformers lets one register an attention function by name; a family that calls it for every layer can be
served like this. Which ones do is found out by trying (`Span`), never by their names.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from peer.model.kv_cache import KVCache
from peer.model.recording import aside

NAME = "corolla_joint"

JOINED_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose masks are known here. Chunks of attention would need the family's own."""

COUPLED_POSITIONS = {"dynamic", "longrope"}
"""Rotary embeddings that follow the longest position of a pass: one session would change another's."""


class JointCache(Cache):
    """The caches of several sessions, for one forward pass of `counts` new positions of each.

    The family sees one sequence of all new positions, and a cache that holds nothing before. With `gathers`
    it is given what all sessions keep, one behind the other: some families make keys and values of that after
    the cache (DeepSeek's latents). For all others it would be a copy of every cache in every layer.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int], *, gathers: bool = False) -> None:
        super().__init__(layers=[])
        self.caches = caches
        self.counts = list(counts)
        self.written = 0
        """Layers that have kept their keys and values in this pass."""
        self.attended = 0
        """Layers whose attention was computed here."""
        self._gathers = gathers
        self._windows = caches[0].windows
        self._made = (torch.empty(0), torch.empty(0), 0)
        """The last layer's new keys and values, and its number."""
        self._lengths: list[int] = []
        """Positions of each session that the family was given, one behind the other."""
        self._masks: dict[tuple[int, int, int | None, torch.device], torch.Tensor] = {}

    def positions(self, _: int) -> torch.Tensor:
        """The next positions of all sessions, one session after another."""
        parts = zip(self.caches, self.counts, strict=True)
        return torch.cat([cache.positions(count) for cache, count in parts])

    def start_over(self) -> None:
        """Forget what this pass has kept so far."""
        for cache in self.caches:
            cache.truncate(cache.length)
        self.written = self.attended = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take [1, heads, total, width] of all sessions: each keeps its part when attention follows."""
        self.written += 1
        self._made = key_states, value_states, layer_idx
        if not self._gathers:
            return key_states, value_states
        shown = self._keep(key_states, value_states, layer_idx)
        self._lengths = [keys.shape[2] for keys, _ in shown]
        keys, values = zip(*shown, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def attend(
        self,
        query: torch.Tensor,
        made: tuple[torch.Tensor, torch.Tensor],
        attention: Attention,
        extras: dict[str, Any],
    ) -> torch.Tensor:
        """Queries [1, heads, total, width] against what each session keeps: [1, total, heads, width].

        `made` are the keys and values that the family made of what it was given.
        """
        self.attended += 1
        keys, values, layer = self._made
        if not self._gathers:
            # How much is kept differs from step to step, so in a recording this is a call of its own.
            return aside(_keep_and_look, query, keys, values, layer, attention, extras)
        parts = (torch.split(part, self._lengths, 2) for part in made)
        return self._look(query, list(zip(*parts, strict=True)), layer, attention, extras)

    def keep_and_look(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: int,
        attention: Attention,
        extras: dict[str, Any],
    ) -> torch.Tensor:
        """Let each session keep its part of a layer's new keys and values, and compute attention."""
        return self._look(query, self._keep(keys, values, layer), layer, attention, extras)

    def _keep(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each session's part goes to its cache; gives what it may look at."""
        parts = (torch.split(states, self.counts, 2) for states in (keys, values))
        return [
            cache.update(mine, its_values, layer)
            for cache, mine, its_values in zip(self.caches, *parts, strict=True)
        ]

    def _look(
        self,
        query: torch.Tensor,
        shown: Sequence[tuple[torch.Tensor, torch.Tensor]],
        layer: int,
        attention: Attention,
        extras: dict[str, Any],
    ) -> torch.Tensor:
        outputs = []
        for queries, (keys, values) in zip(torch.split(query, self.counts, 2), shown, strict=True):
            count, length = queries.shape[2], keys.shape[2]
            mask = None if count == 1 else self._mask(count, length, self._windows[layer], query.device)
            outputs.append(attention.compute(queries, keys, values, mask, extras))
        return torch.cat(outputs, 1)

    def _mask(self, count: int, shown: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Which of the shown positions [count, shown] each of the last `count` may look at."""
        key = (count, shown, window, device)
        if key not in self._masks:
            mine = torch.arange(shown - count, shown, device=device)[:, None]
            theirs = torch.arange(shown, device=device)
            allowed = theirs <= mine
            if window is not None:
                allowed &= theirs > mine - window
            self._masks[key] = allowed
        return self._masks[key]

    # What a family may ask of a cache before its layers run.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return self.caches[0].is_sliding

    @property
    def is_linear(self) -> list[bool]:
        return self.caches[0].is_linear

    @property
    def is_dummy(self) -> list[bool]:
        return self.caches[0].is_dummy

    @property
    def is_compileable(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self._windows)


@dataclass(frozen=True)
class Attention:
    """How the module of one layer looks at one session's keys and values."""

    module: nn.Module
    scaling: float | None
    eager: Any
    """The family's own function, where torch's does not do."""

    def compute(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        extras: dict[str, Any],
    ) -> torch.Tensor:
        """[1, heads, count, width] in, [1, count, heads, width] out; the mask says who looks at what."""
        if self.eager is None:
            return _grouped_attention(queries, keys, values, mask, self.scaling)
        if mask is not None:
            lowest = torch.finfo(queries.dtype).min
            mask = torch.zeros_like(mask, dtype=queries.dtype).masked_fill(~mask, lowest)[None, None]
        output: torch.Tensor = self.eager(
            self.module, queries, keys, values, mask, scaling=self.scaling, **extras
        )[0]
        return output


def _grouped_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """One session's attention: [1, heads, count, width] in, [1, count, heads, width] out.

    The query heads that share a key head stand in a row as if they were positions: repeating the keys for
    them cost 45 times as much.
    """
    _, heads, count, width = queries.shape
    groups = keys.shape[1]
    rows = queries.reshape(1, groups, heads // groups * count, width)
    if mask is not None:
        mask = mask.repeat(heads // groups, 1)
    output = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    return output.reshape(1, heads, count, -1).transpose(1, 2)


class Joining:
    """Lets a model's forward pass serve several sessions: attention goes through `JointCache.attend`."""

    def __init__(self, model: PreTrainedModel, *, gathers: bool) -> None:
        self.gathers = gathers
        configs: list[Any] = [part.config for part in model.modules() if hasattr(part, "config")]
        self._configs: list[PretrainedConfig] = list({id(config): config for config in configs}.values())
        self._usual = [config._attn_implementation for config in self._configs]

    def cache(self, caches: Sequence[KVCache], counts: Sequence[int]) -> JointCache:
        """The caches of several sessions as this model needs them."""
        return JointCache(caches, counts, gathers=self.gathers)

    @contextmanager
    def through(self, cache: JointCache) -> Iterator[None]:
        """While this lasts, in this thread, attention of this model looks at the sessions of `cache`."""
        _RUNNING.cache = cache
        # Unknown to transformers' mask functions, so they build none.
        for config in self._configs:
            config._attn_implementation = NAME
        _RUNNING.eager = self._usual[0] != "sdpa"
        try:
            yield
        finally:
            for config, usual in zip(self._configs, self._usual, strict=True):
                config._attn_implementation = usual
            del _RUNNING.cache


_RUNNING = threading.local()


def may_join(model: PreTrainedModel) -> bool:
    """False when sessions of this model would change each other, in ways that a short trial does not show."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    rotary = {kind for part in model.modules() for kind in _rotary_kinds(getattr(part, "rope_type", None))}
    return kinds <= JOINED_LAYERS and not rotary & COUPLED_POSITIONS


def _rotary_kinds(rope_type: object) -> list[str]:
    """One name, or one for each type of layer."""
    if isinstance(rope_type, dict):
        return [str(kind) for kind in rope_type.values()]
    return [str(rope_type)]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **extras: Any,  # noqa: ANN401 - whatever a family gives its attention
) -> tuple[torch.Tensor, None]:
    """What transformers calls by the name `NAME`. The keys that it brings are those of this pass alone."""
    if extras.get("position_bias") is not None:
        raise NotImplementedError("attention with a position bias is not computed for several sessions")
    cache: JointCache = _RUNNING.cache
    eager = sys.modules[type(module).__module__].eager_attention_forward if _RUNNING.eager else None
    attention = Attention(module, scaling, eager)
    return cache.attend(query, (key, value), attention, extras if eager else {}), None


def _keep_and_look(*arguments: Any) -> torch.Tensor:  # noqa: ANN401 - those of the cache's own
    """By the sessions of this step, whichever those are."""
    cache: JointCache = _RUNNING.cache
    return cache.keep_and_look(*arguments)


_register: Any = AttentionInterface.register
_register(NAME, _attend)
