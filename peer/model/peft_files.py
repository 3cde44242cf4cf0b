"""LoRA in the files of PEFT: what `--adapter` and `load_lora` read. Only safetensors, never a pickle."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peer.model.errors import BadInputs
from peer.model.extras import Adapter, Pair

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NOT_SERVED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
"""Wishes of a config that change what is computed beyond B A times one scale."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter of a directory: a name for people, and an id that stands for its very numbers."""

    name: str
    id: str
    adapter: Adapter


def open_adapter(directory: Path) -> StoredAdapter:
    """An adapter to offer to others. Raises BadInputs."""
    config, pairs = read_peft(directory)
    scale = scale_of(config)
    digest = hashlib.sha256(f"corolla-adapter-1 {scale!r} ".encode())
    digest.update((directory / WEIGHTS).read_bytes())
    name = re.sub(r"[^A-Za-z0-9._-]", "-", directory.resolve().name)[:64]
    return StoredAdapter(
        name, digest.hexdigest(), Adapter({path: (down, up * scale) for path, (down, up) in pairs.items()})
    )


def read_peft(directory: Path) -> tuple[dict[str, Any], dict[str, Pair]]:
    """A LoRA adapter's config, and its A and B by path, unscaled. Raises BadInputs."""
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise BadInputs(
            f"{directory} needs {CONFIG} and {WEIGHTS}: only safetensors are read, never a pickle"
        )
    config = _read_config(directory)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(directory / WEIGHTS).items():
        path, _, side = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if side not in ("lora_A", "lora_B"):
            raise BadInputs(f"{directory} holds {name}, which is no matrix of a LoRA")
        found.setdefault(path, {})[side] = tensor.float()
    if any(pair.keys() != {"lora_A", "lora_B"} for pair in found.values()):
        raise BadInputs(f"{directory} has an A without B, or a B without A")
    return config, {path: (pair["lora_A"], pair["lora_B"]) for path, pair in sorted(found.items())}


def _read_config(directory: Path) -> dict[str, Any]:
    """The config of a plain LoRA. Raises BadInputs."""
    try:
        config: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind, _ = config.get("peft_type"), scale_of(config)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise BadInputs(
            f"{directory / CONFIG} is no config of a LoRA with its r and lora_alpha: save the adapter again"
        ) from error
    odd = [name for name in NOT_SERVED if config.get(name)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if kind != "LORA":
        odd.append(f"peft_type {kind}")
    if odd:
        raise BadInputs(
            f"{directory} is no plain LoRA: train it anew without {', '.join(odd)}, or merge it into the "
            "model with PEFT's merge_and_unload and serve that"
        )
    return config


def scale_of(config: Mapping[str, Any]) -> float:
    """What PEFT multiplies B A with."""
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
