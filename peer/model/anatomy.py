"""Find the parts of any family's model: its layers, what runs before them, what runs after.

No list of families: the family's own forward pass is run once with every layer skipped and every other part
played by a stand-in that needs no weights, and we watch the order of the calls. A model that cannot be cut,
because its layers are fed by more than the hidden states, shows here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from peer.model.errors import UnsupportedModel, first_line

Anything: TypeAlias = Any
"""What a family hands to its layers and other parts, and gets from them: each does it in its own way."""

COUNT = 3
"""Positions in the trial run: not 1 and not 2, so that no shape agrees by chance."""


class Reached(Exception):
    """Leaves a family's forward pass with the hidden states [batch, count, hidden] that were wanted."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.hidden_states = hidden_states


@dataclass(frozen=True)
class Anatomy:
    """The outermost parts with weights that a model runs before its layers, and those it runs after them."""

    before: list[nn.Module]
    after: list[nn.Module]


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers in order: the outermost list that has as many entries as the config has layers."""
    count = model.config.num_hidden_layers
    lists = [
        (name.count("."), part)
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    if not lists:
        raise UnsupportedModel(f"{model.config.model_type} models have no plain list of {count} layers")
    return list(min(lists, key=lambda found: found[0])[1])


def stand_in(part: nn.Module, fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What plays an absent part: for embeddings and projections `fill(*shape)`, else its own input.

    What it gives never reaches an answer: the hidden states that arrive replace it at the first layer.
    """

    def embed(*args: Anything, **kwargs: Anything) -> torch.Tensor:
        first = _first(args, kwargs)
        # OPT looks positions up by an attention mask; one row for all positions is as good.
        rows = (1, 1) if first.is_floating_point() else first.shape
        return fill(*rows, part.embedding_dim)

    def project(*args: Anything, **kwargs: Anything) -> torch.Tensor:
        return fill(*_first(args, kwargs).shape[:-1], part.out_features)

    def pass_on(*args: Anything, **kwargs: Anything) -> torch.Tensor:
        return _first(args, kwargs)

    if hasattr(part, "embedding_dim"):
        return embed
    return project if hasattr(part, "out_features") else pass_on


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    first: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return first


def survey(model: PreTrainedModel, layers: list[nn.Module], run: Callable[..., object]) -> Anatomy:
    """Sort the parts of a model without weights. `run` calls it with `input_ids` or `inputs_embeds`."""
    outside = list(_outside(model, layers))
    embedding = model.get_input_embeddings()
    kind = model.config.model_type
    fed = f"the layers of {kind} models are fed by more than hidden states and positions"

    with_ids = Trial(model, layers, outside)
    ids = torch.zeros(1, COUNT, dtype=torch.int64)
    with_ids.run(lambda: run(input_ids=ids), f"{kind} models cannot be cut into spans")
    with_hidden = Trial(model, layers, outside)
    hidden_states = torch.rand(1, COUNT, model.config.hidden_size)
    with_hidden.run(lambda: run(inputs_embeds=hidden_states), fed)

    # Both runs began with other numbers, so whatever differs now was made from them.
    if not _same(with_ids.arguments, with_hidden.arguments):
        raise UnsupportedModel(fed)
    called = {embedding, *with_ids.called, *with_hidden.called}
    return Anatomy(
        [part for part in outside if part in called], [part for part in outside if part not in called]
    )


def _outside(model: nn.Module, layers: list[nn.Module]) -> Iterator[nn.Module]:
    """The outermost parts with weights of their own that are no layer and hold no layer."""
    inner = {part for layer in layers for part in layer.modules()}
    holders = {part for part in model.modules() if not inner.isdisjoint(part.modules())}

    def walk(part: nn.Module) -> Iterator[nn.Module]:
        for child in part.children():
            if child in inner:
                continue
            if child not in holders and _holds_weights(child):
                yield child
            else:
                yield from walk(child)

    yield from dict.fromkeys(walk(model))


def _holds_weights(part: nn.Module) -> bool:
    persistent = (name for name in part._buffers if name not in part._non_persistent_buffers_set)
    return bool(part._parameters) or any(True for _ in persistent)


class Trial:
    """One run of a family's forward pass in which every layer is skipped and every other part is played.

    `called` are the parts that ran before the first layer; `arguments` is what each layer got besides hidden
    states.
    """

    def __init__(self, model: PreTrainedModel, layers: list[nn.Module], outside: list[nn.Module]) -> None:
        self.called: set[nn.Module] = set()
        self.arguments: list[Any] = []
        self._kind = model.config.model_type
        self._shape = (1, COUNT, model.config.hidden_size)
        self._arrived = torch.empty(0)
        self._layer_count = len(layers)
        self._forwards: dict[nn.Module, Callable[..., torch.Tensor]] = {
            layer: partial(self._skip, index) for index, layer in enumerate(layers)
        }
        for part in outside:
            self._forwards[part] = partial(self._play, part, stand_in(part, torch.rand))

    def run(self, forward: Callable[[], object], refusal: str) -> None:
        """Call `forward` until it reaches the last layer. Whatever goes wrong is a refusal of the model."""
        for part, replacement in self._forwards.items():
            part.forward = replacement
        try:
            forward()
        except Reached:
            return
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(f"{refusal} ({first_line(error)})") from error
        finally:
            for part in self._forwards:
                del part.forward
        raise UnsupportedModel(f"{self._kind} models do not run all of their layers")

    def _play(
        self, part: nn.Module, play: Callable[..., torch.Tensor], *args: Anything, **kwargs: Anything
    ) -> torch.Tensor:
        if self.arguments:
            raise UnsupportedModel(f"{self._kind} models compute something between their layers")
        self.called.add(part)
        return play(*args, **kwargs)

    def _skip(self, index: int, *args: Anything, **kwargs: Anything) -> torch.Tensor:
        if index != len(self.arguments):
            raise UnsupportedModel(f"{self._kind} models do not run their layers once and in order")
        arriving, rest = split_arguments(args, kwargs)
        if index == 0:
            self._arrived = arriving
            if arriving.shape != self._shape:
                raise UnsupportedModel(f"the layers of {self._kind} models pass on more than hidden states")
        self.arguments.append(rest)
        if index == self._layer_count - 1:
            raise Reached(self._arrived)
        # Some families take a layer's output as it is, some take its first element. Whichever is handed to
        # the next layer, that layer is skipped as well.
        return self._arrived


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, list[Any]]:
    """A layer's arguments as the hidden states that reach it, and the rest."""
    if args:
        return args[0], [args[1:], kwargs]
    rest = dict(kwargs)
    return rest.pop("hidden_states"), [(), rest]


def replace_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden_states: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with other hidden states."""
    if args:
        return (hidden_states, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": hidden_states}


def _same(one: Anything, other: Anything) -> bool:
    """True when all tensors in two nests of tuples, lists and dicts are equal. The rest is not compared."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor)
