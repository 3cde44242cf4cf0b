"""What we take from transformers' half-private parts, all in one place. Leaves the cutting to `span`.

A family's own classes compute everything, and its own rules translate the names and layouts of a checkpoint
(old names, tensors stored one by one that are used as one). Those rules, and the functions that apply them,
may change between minor versions of transformers, so pyproject.toml pins one; tests/peer/model/ runs many
families through this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from peer.model.anatomy import Anything
from peer.model.errors import UnsupportedModel
from peer.model.unread import Unread

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""The kinds of layers that keep keys and values per position, and nothing else."""


RECURRENT = {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"}


class Readable(Protocol):
    """A tensor that is read when it is indexed."""

    def __getitem__(self, index: Any) -> torch.Tensor: ...  # noqa: ANN401 - whatever torch takes as an index


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The family's whole causal language model without any memory for its tensors."""
    # Untyped there, as are a few more below.
    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            # With a config of its own: how experts are chosen and attention is computed is set there.
            model: PreTrainedModel = from_config(deepcopy(config), dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModel(
            f"transformers has no causal language model for {config.model_type}: {error}"
        ) from error
    model.train(False)
    model.requires_grad_(False)
    return model


def check_rollback(config: PretrainedConfig, model: PreTrainedModel) -> None:
    """Refuse a family whose layers keep more than keys and values: positions could not be taken back."""
    kinds = set(getattr(config, "layer_types", None) or ATTENTION)
    if model._is_stateful or kinds & RECURRENT:
        raise UnsupportedModel(
            f"{config.model_type} models keep a recurrent state, which cannot go back to an earlier position"
        )
    if kinds - ATTENTION:
        others = ", ".join(sorted(kinds - ATTENTION))
        raise UnsupportedModel(f"{config.model_type} models have layers that are not served: {others}")
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModel(
            f"{config.model_type} models share keys and values between layers, across spans"
        )


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """How many positions each layer may look back on, None for all: what transformers' own cache keeps."""
    _, arguments = get_layer_types_and_kwargs(config)
    return [argument.get("sliding_window") for argument in arguments]


def packable(model: PreTrainedModel) -> dict[str, bool]:
    """The parameters that rows of activations are multiplied with: name -> do inputs come before outputs.

    Not those that choose experts: they are small, and a wrong choice costs more than a rounded product.
    """
    routers = {
        child
        for part in model.modules()
        if any(name == "experts" for name, _ in part.named_children())
        for child in part.children()
    }
    found: dict[str, bool] = {}
    for path, part in model.named_modules():
        if isinstance(part, nn.Linear | Conv1D) and part not in routers:
            if part._parameters.get("weight") is not None:
                found[f"{path}.weight"] = isinstance(part, Conv1D)
        elif (flipped := _experts_flipped(part)) is not None:
            for name, weight in part._parameters.items():
                if weight is not None and weight.dim() == 3:
                    found[f"{path}.{name}"] = flipped
    return found


def fused_experts(model: PreTrainedModel) -> set[str]:
    """The parameters that hold one matrix per expert: a checkpoint may store these one by one."""
    return {name for name, weight in model.named_parameters() if weight.dim() == 3}


def _experts_flipped(part: nn.Module) -> bool | None:
    """Whether the matrices of fused experts are [experts, inputs, outputs]; None for other parts."""
    # The one family that fuses experts and does not tell.
    if type(part).__name__ == "Llama4TextExperts":
        return True
    return getattr(part, "is_transposed", None)


def compute_experts_one_by_one(model: PreTrainedModel) -> None:
    """Let fused experts pick their matrices one after another, which is how packed ones can be picked."""
    if any(getattr(part, "is_transposed", None) is not None for part in model.modules()):
        choose: Callable[[str], None] = model.set_experts_implementation
        choose("eager")


def embedding_name(model: PreTrainedModel) -> str | None:
    """The parameter of the embedding, if the model still has it and it is a plain table of rows."""
    table: nn.Module = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or table._parameters.get("weight") is None:
        return None
    return next(f"{path}.weight" for path, part in model.named_modules() if part is table)


def tied_head(model: PreTrainedModel) -> str | None:
    """The parameter of the head, if it has none of its own but the embedding's."""
    head = cast(Callable[[], nn.Module | None], model.get_output_embeddings)()
    if head is None or head._parameters.get("weight") is None:
        return None
    name = next(f"{path}.weight" for path, part in model.named_modules() if part is head)
    source = (model.all_tied_weights_keys or {}).get(name)
    return name if source is not None and source == embedding_name(model) else None


def put(model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
    """Make a tensor that counts as a parameter the parameter of that name."""
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, weight)


def names_to_read(
    model: PreTrainedModel, names: Iterable[str], without: frozenset[str] | set[str] = frozenset()
) -> dict[str, str]:
    """Those tensors of a checkpoint that become part of what is in `model`, but for parameters `without`.

    Each with the parameter that it becomes, or the first one of several.
    """
    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in without}

    def parameter(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        return renamed if renamed in held else name

    # Sorted, because some rules look at the names in order.
    found = {name: parameter(name) for name in sorted(names)}
    return {name: parameter for name, parameter in found.items() if parameter in held}


class Pack(Protocol):
    """What puts parameters into another form while they are read."""

    def wants(self, name: str) -> bool: ...

    def pack(self, name: str, tensor: torch.Tensor) -> torch.Tensor: ...


class _PackWhileReading:
    """Stands in the place of transformers' own quantizers, and of their operations.

    For them its loader reads one tensor after another, and hands each over before it reads the next.
    """

    pre_quantized = False

    def __init__(self, packing: Pack) -> None:
        self._packing = packing
        self._misfits: set[str] = set()

    def param_needs_quantization(self, _: PreTrainedModel, name: str) -> bool:
        # Of what it says are its own, the loader does not compare the shapes.
        return self._packing.wants(name) and name not in self._misfits

    def get_quantize_ops(self) -> _PackWhileReading:
        return self

    def convert(
        self, tensors: dict[str, Anything], *, model: PreTrainedModel, **_: Anything
    ) -> dict[str, Anything]:
        return {name: self._converted(model, name, tensors.pop(name)) for name in list(tensors)}

    def _converted(self, model: PreTrainedModel, name: str, found: Anything) -> torch.Tensor:
        tensor: torch.Tensor = found[0] if isinstance(found, list) else found
        wants = self._packing.wants(name)
        if wants and tensor.shape == model.get_parameter(name).shape:
            return self._packing.pack(name, tensor)
        if wants:
            self._misfits.add(name)
        return tensor.dense() if isinstance(tensor, Unread) else tensor


def fill(
    model: PreTrainedModel,
    tensors: Mapping[str, Readable],
    dtype: torch.dtype,
    device: torch.device,
    packing: Pack | None = None,
    apart: Mapping[str, torch.device] | None = None,
) -> None:
    """Read tensors into a model, translated to the family's layout. Raises UnsupportedModel if any lacks.

    `apart` are modules, by their paths, that go to other devices. `packing` gets the parameters that it wants
    one by one, and gives what becomes of them.
    """
    plan = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device, **(apart or {})},
        weight_mapping=cast(Any, get_model_conversion_mapping(model) or []),
        hf_quantizer=cast(Any, _PackWhileReading(packing) if packing else None),
    )
    with _quiet():
        result, _ = convert_and_load_state_dict_in_model(model, cast(dict[str, Any], tensors), plan)
    if model.all_tied_weights_keys:
        model.tie_weights(missing_keys=set(result.missing_keys), recompute_mapping=False)
    model.requires_grad_(False)
    for name, stored, expected in result.mismatched_keys:
        raise UnsupportedModel(
            f"{name} is {list(stored)} in the checkpoint, but its config says {list(expected)}"
        )
    for name, trace in result.conversion_errors.items():
        reason = trace.strip().splitlines()[-1]
        raise UnsupportedModel(f"{name} of this checkpoint does not fit its family: {reason}")
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise UnsupportedModel(
            f"the checkpoint lacks {missing[0]} and {len(missing) - 1} more of this span's tensors"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers' own while a span loads."""
    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def make_buffers(model: PreTrainedModel, parts: Iterable[nn.Module], device: torch.device) -> None:
    """Let the family compute the tensors that no checkpoint holds: rotary frequencies, masks, scales.

    Must come before the weights are read: some families initialise weights in the same step.
    """
    # As in transformers' own loader, the innermost model that holds a part knows how to initialise it.
    owners = {
        inner: owner
        for owner in model.modules()
        if isinstance(owner, PreTrainedModel)
        for inner in owner.modules()
    }
    for part in parts:
        missing = [
            name
            for name, buffer in part._buffers.items()
            if buffer is not None and buffer.is_meta and name in part._non_persistent_buffers_set
        ]
        for name in missing:
            part._buffers[name] = torch.empty_like(cast(torch.Tensor, part._buffers[name]), device=device)
        if missing:
            initialise: Callable[[nn.Module], None] = owners[part]._init_weights
            initialise(part)
