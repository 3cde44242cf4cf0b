"""Forward and backward passes for others, in pieces between which a chat's step can pass.

Each piece runs in the executor's thread. What a pass needs is in its request: nothing is kept behind it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from peer.model.errors import BadInputs
from peer.model.extras import Adapter, Extras
from peer.model.kv_cache import KVCache
from peer.model.span import Span

EFFICIENT_TOKENS = 128
"""Rows of a batch go together up to so many positions: more take memory, fewer take longer."""
PROMPT = "prompt."

Tensors = Mapping[str, torch.Tensor]


class Pieces:
    """A pass that is computed piece by piece."""

    def __init__(self, pieces: Iterator[None], result: dict[str, torch.Tensor]) -> None:
        self._pieces = pieces
        self.result = result
        self.computed_ms = 0.0

    def compute_one(self) -> bool:
        """Compute the next piece. False when there was none left."""
        started = time.perf_counter()
        more = next(self._pieces, self) is not self
        self.computed_ms += (time.perf_counter() - started) * 1000
        return more


@dataclass(frozen=True)
class Inputs:
    """A checked request: hidden states [batch, count, width] for layers [start, end), and its extras."""

    hidden: torch.Tensor
    start: int
    end: int
    extras: Extras

    def rows(self, chosen: slice) -> tuple[torch.Tensor, Extras]:
        """Some rows of the batch."""
        mask, positions = self.extras.mask, self.extras.positions
        return self.hidden[chosen], replace(
            self.extras,
            mask=None if mask is None else mask[chosen],
            positions=None if positions is None else positions[chosen],
        )


class Budget:
    """How long the next piece may take, looked up when it begins."""

    def __init__(self, ms: float) -> None:
        self.ms = ms


class PassPace:
    """How many layers fit into a piece, by what pieces took before."""

    def __init__(self) -> None:
        self._ms: dict[bool, float] = {}

    def layers(self, tokens: int, budget_ms: float, *, backward: bool) -> int:
        """Layers to compute for so many positions in one piece; at first one, to learn how long it takes."""
        known = self._ms.get(backward)
        return 1 if known is None else max(1, int(budget_ms / (known * tokens)))

    def took(self, tokens: int, layers: int, took_ms: float, *, backward: bool) -> None:
        """A piece took so long."""
        now = took_ms / (tokens * layers)
        self._ms[backward] = (self._ms.get(backward, now) + now) / 2


def checked(span: Span, tensors: Tensors, start: int, end: int, adapter: Adapter | None) -> Inputs:
    """What a request brings, if it fits the span. Raises BadInputs."""
    if not span.start <= start < end <= span.end:
        raise BadInputs(f"this peer serves layers {span.start}:{span.end}, not {start}:{end}")
    hidden = tensors.get("hidden")
    if hidden is None or hidden.dim() != 3 or hidden.shape[2] != span.hidden_size or 0 in hidden.shape:
        raise BadInputs(f"a pass brings hidden states [batch, count, {span.hidden_size}]")
    if not hidden.is_floating_point():
        raise BadInputs("hidden states are no whole numbers")
    prompts: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(PROMPT):
            layer = name.removeprefix(PROMPT)
            if not layer.isdigit() or not start <= int(layer) < end:
                raise BadInputs(f"{name} is for no layer of {start}:{end}")
            if tensor.dim() != 2 or tensor.shape[1] != span.hidden_size or not tensor.is_floating_point():
                raise BadInputs(f"{name} has to be [length, {span.hidden_size}]")
            prompts[int(layer)] = tensor
    mask, positions = tensors.get("mask"), tensors.get("positions")
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != len(hidden) or mask.is_floating_point()):
        raise BadInputs("a mask has a row of whole numbers for each row of the batch")
    if positions is not None:
        _check_positions(span, positions, hidden)
    moved = {layer: prompt.to(span.device) for layer, prompt in prompts.items()}
    return Inputs(hidden.to(span.device, span.dtype), start, end, Extras(mask, positions, moved, adapter))


def _check_positions(span: Span, positions: torch.Tensor, hidden: torch.Tensor) -> None:
    limit = span.context_length or 1 << 20
    if positions.is_floating_point() or positions.shape != hidden.shape[:2]:
        raise BadInputs("positions are whole numbers [batch, count]")
    if not 0 <= int(positions.min()) <= int(positions.max()) < limit:
        raise BadInputs(f"positions lie below {limit}")


def check_length(span: Span, inputs: Inputs, before: int = 0) -> None:
    """Raises BadInputs when a text is longer than the model allows, or its mask is not as long as it."""
    length = before + inputs.hidden.shape[1]
    if span.context_length and length > span.context_length:
        raise BadInputs(f"{length} positions are more than this model's {span.context_length}")
    if inputs.extras.mask is not None and inputs.extras.mask.shape[1] != length:
        raise BadInputs(f"a mask for {length} positions has as many columns")


def forward(span: Span, inputs: Inputs, budget: Budget, pace: PassPace, *, each: bool) -> Pieces:
    """The hidden states behind the last layer, or behind each."""
    result: dict[str, torch.Tensor] = {}

    def pieces() -> Iterator[None]:
        behind: list[list[torch.Tensor]] = []
        for chosen in row_groups(inputs):
            states, extras = inputs.rows(chosen)
            mine: list[torch.Tensor] = []
            for start, end in _layer_groups(inputs, states, budget, pace, backward=False):
                with torch.inference_mode(), _timed(pace, states, end - start, backward=False), span.alone():
                    found = span.states(states, start, end, extras)
                states = found[-1]
                mine += found if each else []
                yield
            behind.append(mine if each else [states])
        joined = [torch.cat(group) for group in zip(*behind, strict=True)]
        names = [f"hidden.{layer}" for layer in range(inputs.start, inputs.end)] if each else ["hidden"]
        result.update(zip(names, joined, strict=True))

    return Pieces(pieces(), result)


def backward(
    span: Span, inputs: Inputs, gradient: torch.Tensor, budget: Budget, pace: PassPace, *, learns: bool
) -> Pieces:
    """The gradients of the hidden states, of deep prompts, and of the adapter if it learns.

    Where a piece cannot hold all layers, the hidden states between pieces are computed first and kept while
    the pass lasts; so no more than one piece's inner numbers are in memory.
    """
    if gradient.shape != inputs.hidden.shape or not gradient.is_floating_point():
        raise BadInputs("a gradient has the shape of the hidden states")
    result: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    gradient = gradient.to(span.device, span.dtype)

    def pieces() -> Iterator[None]:
        found: list[torch.Tensor] = []
        for chosen in row_groups(inputs):
            states, extras = inputs.rows(chosen)
            entries: list[tuple[int, int, torch.Tensor]] = []
            groups = list(_layer_groups(inputs, states, budget, pace, backward=True))
            for start, end in groups[:-1]:
                entries.append((start, end, states))
                with torch.no_grad(), _timed(pace, states, end - start, backward=False), span.alone():
                    states = span.states(states, start, end, extras)[-1]
                yield
            entries.append((*groups[-1], states))
            flowing = gradient[chosen]
            for start, end, states in reversed(entries):
                with _timed(pace, states, end - start, backward=True), span.alone():
                    flowing, others = _gradients(span, states, (start, end), extras, flowing, learns=learns)
                for name, tensor in others.items():
                    sums[name] = sums[name] + tensor if name in sums else tensor
                yield
            found.append(flowing)
        result["hidden"] = torch.cat(found)
        result.update(sums)

    return Pieces(pieces(), result)


def append(span: Span, inputs: Inputs, cache: KVCache, chunk: int, *, each: bool) -> Pieces:
    """Append a session's next positions to its cache, so many at a time."""
    result: dict[str, torch.Tensor] = {}

    def pieces() -> Iterator[None]:
        count, before = inputs.hidden.shape[1], cache.length
        behind: list[list[torch.Tensor]] = []
        for start in range(0, count, chunk):
            some = slice(start, min(start + chunk, count))
            mask, positions = inputs.extras.mask, inputs.extras.positions
            extras = replace(
                inputs.extras,
                mask=None if mask is None else mask[:, : before + some.stop],
                positions=None if positions is None else positions[:, some],
            )
            with torch.inference_mode(), span.alone():
                found = span.states(inputs.hidden[:, some], inputs.start, inputs.end, extras, cache)
            behind.append(found if each else found[-1:])
            yield
        joined = [torch.cat(group, 1) for group in zip(*behind, strict=True)]
        names = [f"hidden.{layer}" for layer in range(inputs.start, inputs.end)] if each else ["hidden"]
        result.update(zip(names, joined, strict=True))

    return Pieces(pieces(), result)


def row_groups(inputs: Inputs) -> list[slice]:
    """The batch in groups of rows that are long enough to be computed well, and no longer."""
    batch, count = inputs.hidden.shape[:2]
    step = max(1, EFFICIENT_TOKENS // count)
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _layer_groups(
    inputs: Inputs, states: torch.Tensor, budget: Budget, pace: PassPace, *, backward: bool
) -> Iterator[tuple[int, int]]:
    start = inputs.start
    while start < inputs.end:
        tokens = states.shape[0] * states.shape[1]
        end = min(inputs.end, start + pace.layers(tokens, budget.ms, backward=backward))
        yield start, end
        start = end


class _timed:  # noqa: N801 - reads as a statement
    """Tells the pace how long what is inside took."""

    def __init__(self, pace: PassPace, states: torch.Tensor, layers: int, *, backward: bool) -> None:
        self._pace, self._tokens, self._layers = pace, states.shape[0] * states.shape[1], layers
        self._backward = backward
        self._started = time.perf_counter()

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took_ms = (time.perf_counter() - self._started) * 1000
        self._pace.took(self._tokens, self._layers, took_ms, backward=self._backward)


def _gradients(
    span: Span,
    states: torch.Tensor,
    layers: tuple[int, int],
    extras: Extras,
    gradient: torch.Tensor,
    *,
    learns: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of the hidden states, and of everything else by its name on the wire."""
    start, end = layers
    arriving = states.detach().requires_grad_()
    prompts = {
        layer: prompt.detach().requires_grad_()
        for layer, prompt in extras.prompts.items()
        if start <= layer < end
    }
    adapter, leaves = extras.adapter, {f"{PROMPT}{layer}": prompt for layer, prompt in prompts.items()}
    if adapter is not None and learns:
        pairs = {
            path: (down.detach().requires_grad_(), up.detach().requires_grad_())
            for path, (down, up) in adapter.pairs.items()
        }
        adapter = Adapter(pairs)
        for path, (down, up) in pairs.items():
            leaves |= {f"{path}.A": down, f"{path}.B": up}
    with torch.enable_grad():
        output = span.states(arriving, start, end, replace(extras, prompts=prompts, adapter=adapter))[-1]
        # An adapter's other matrices belong to layers of other pieces.
        found = torch.autograd.grad(output, [arriving, *leaves.values()], gradient, allow_unused=True)
    others = {name: tensor for name, tensor in zip(leaves, found[1:], strict=True) if tensor is not None}
    return found[0], others
