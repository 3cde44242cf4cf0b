"""LoRA inside layers that others hold: the matrices and their training are here, in PEFT's files too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from peer.model.errors import BadInputs
from peer.model.extras import Pair
from peer.model.peft_files import CONFIG, PREFIX, WEIGHTS, read_peft, scale_of
from peer.remote.ends import Matrix


class Lora(nn.Module):
    """Matrices A and B for some matrices of a model. New ones change nothing: B begins with zeros."""

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] = ("q_proj", "v_proj", "query_key_value", "c_attn"),
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.targets = rank, alpha, list(targets)
        self.scale = alpha / rank
        self.paths = [path for path in matrices if path.rpartition(".")[2] in targets]
        if not self.paths:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in matrices}))
            raise BadInputs(f"no matrix of the model is named {' or '.join(targets)}: it has {known}")
        self.down = nn.ParameterList(_began(rank, matrices[path].inputs) for path in self.paths)
        self.up = nn.ParameterList(torch.zeros(matrices[path].outputs, rank) for path in self.paths)

    def pairs(self) -> dict[str, Pair]:
        """By path, A and B, with the scale in B; gradients flow through."""
        return {
            path: (down, up * self.scale)
            for path, down, up in zip(self.paths, self.down, self.up, strict=True)
        }

    def versions(self) -> tuple[int, ...]:
        """Changes with every change of a matrix."""
        return tuple(matrix._version for matrix in (*self.down, *self.up))

    def save(self, directory: Path, model: str) -> None:
        """As PEFT does, so that `PeftModel.from_pretrained` loads it onto the model."""
        directory.mkdir(parents=True, exist_ok=True)
        names = sorted({path.rpartition(".")[2] for path in self.paths})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": names,
            "inference_mode": True,
        }
        tensors: dict[str, torch.Tensor] = {}
        for path, down, up in zip(self.paths, self.down, self.up, strict=True):
            tensors[f"{PREFIX}{path}.lora_A.weight"] = down.detach().contiguous()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = up.detach().contiguous()
        save_file(tensors, directory / WEIGHTS)
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, matrices: Mapping[str, Matrix], directory: Path) -> Lora:
        """Of PEFT's files. Raises BadInputs for what is no plain LoRA of this model."""
        config, pairs = read_peft(directory)
        targets = sorted({path.rpartition(".")[2] for path in pairs})
        lora = cls(matrices, rank=int(config["r"]), alpha=float(config["lora_alpha"]), targets=targets)
        lora.scale = scale_of(config)
        lora.paths = list(pairs)
        strangers = [path for path in pairs if path not in matrices]
        if strangers:
            raise BadInputs(f"{directory} changes {strangers[0]}, which the model does not have")
        lora.down = nn.ParameterList(down for down, _ in pairs.values())
        lora.up = nn.ParameterList(up for _, up in pairs.values())
        return lora


def _began(rank: int, inputs: int) -> torch.Tensor:
    matrix = torch.empty(rank, inputs)
    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return matrix
