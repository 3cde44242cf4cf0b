"""A family's own model with its ends alone: embedding, last norm and head are here, its layers are gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from peer.model import family
from peer.model.anatomy import Reached, find_layers, split_arguments
from peer.model.checkpoint import Checkpoint
from peer.model.errors import UnsupportedModel
from peer.model.extras import matrix_shape
from peer.model.span import drop_weights, read_later

Task = Literal["text", "classification"]


@dataclass(frozen=True)
class Matrix:
    """What LoRA may change: a matrix of a layer."""

    layer: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Ends:
    """The model, its layers without weights, and what is known of these."""

    model: PreTrainedModel
    layers: list[nn.Module]
    matrices: dict[str, Matrix]
    tuples: bool
    """The family takes the first element of what a layer gives."""


def load_ends(checkpoint: Checkpoint, dtype: torch.dtype, task: Task, labels: int) -> Ends:
    """Read a model's ends. A head for classification that the checkpoint lacks begins with small numbers."""
    model = (
        family.skeleton(checkpoint.config, dtype)
        if task == "text"
        else _classifier(checkpoint, dtype, labels)
    )
    family.check_rollback(checkpoint.config, model)
    layers = find_layers(model)
    matrices = _matrices(model, layers)
    inner = {part for layer in layers for part in layer.modules()}
    family.make_buffers(model, (part for part in model.modules() if part not in inner), torch.device("cpu"))
    drop_weights(inner)
    names = list(family.names_to_read(model, checkpoint.tensor_names))
    checkpoint.fetch(names)
    if task == "classification":
        _begin_head(model, names, dtype)
    family.fill(model, read_later(checkpoint, names, None, dtype, set()), dtype, torch.device("cpu"))
    if task == "classification":
        _head(model).requires_grad_(True)
    return Ends(model, layers, matrices, _takes_tuples(model, layers))


def _classifier(checkpoint: Checkpoint, dtype: torch.dtype, labels: int) -> PreTrainedModel:
    checkpoint.config.num_labels = labels
    from_config: Callable[..., PreTrainedModel] = AutoModelForSequenceClassification.from_config
    try:
        with torch.device("meta"):
            model = from_config(checkpoint.config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModel(
            f"transformers has no classifier for {checkpoint.config.model_type}"
        ) from error
    model.train(False)
    model.requires_grad_(False)
    return model


def _head(model: PreTrainedModel) -> nn.Module:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        raise UnsupportedModel(f"{model.config.model_type} classifiers have no head that is named score")
    return head


def _begin_head(model: PreTrainedModel, names: list[str], dtype: torch.dtype) -> None:
    if any(name.startswith("score.") for name in names):
        return
    head = _head(model)
    for name, tensor in list(head.named_parameters()):
        begun = (
            torch.randn(tensor.shape, dtype=dtype) * 0.02 if tensor.dim() > 1 else torch.zeros_like(tensor)
        )
        setattr(head, name, nn.Parameter(begun))


def _matrices(model: PreTrainedModel, layers: list[nn.Module]) -> dict[str, Matrix]:
    layer_of = {part: index for index, layer in enumerate(layers) for part in layer.modules()}
    return {
        path: Matrix(layer_of[part], *shape)
        for path, part in model.named_modules()
        if part in layer_of and (shape := matrix_shape(part)) is not None
    }


def _takes_tuples(model: PreTrainedModel, layers: list[nn.Module]) -> bool:
    """Whether what a layer gives goes on whole, or its first element: seen at the layer after it."""
    if len(layers) < 2:
        raise UnsupportedModel("a model with a single layer is not worth a swarm")

    def first(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        return split_arguments(args, kwargs)[0]

    def second(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        raise Reached(split_arguments(args, kwargs)[0])

    layers[0].forward, layers[1].forward = first, second
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False)
    except Reached as reached:
        return reached.hidden_states.dim() == 2
    finally:
        del layers[0].forward, layers[1].forward
    raise UnsupportedModel(f"{model.config.model_type} models do not run all of their layers")
