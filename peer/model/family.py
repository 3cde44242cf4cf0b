"""What we take from transformers' half-private parts, all in one place. Leaves the cutting to `span`.

A family's own classes compute everything, and its own rules translate the names and layouts of a checkpoint
(old names, tensors stored one by one that are used as one). Those rules, and the functions that apply them,
may change between minor versions of transformers, so pyproject.toml pins one; tests/peer/model/ runs many
families through this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from transformers.utils import logging

from peer.model.errors import UnsupportedModel

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
            model: PreTrainedModel = from_config(config, dtype=dtype, trust_remote_code=False)
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


def names_to_read(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those tensors of a checkpoint that become part of what is still in `model`."""
    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    held = model.state_dict()

    def wanted(name: str) -> bool:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        return renamed in held or name in held

    # Sorted, because some rules look at the names in order.
    return [name for name in sorted(names) if wanted(name)]


def fill(
    model: PreTrainedModel, tensors: Mapping[str, Readable], dtype: torch.dtype, device: torch.device
) -> None:
    """Read tensors into a model, translated to the family's layout. Raises UnsupportedModel if any lacks."""
    plan = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=cast(Any, get_model_conversion_mapping(model) or []),
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
