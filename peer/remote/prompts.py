"""Virtual tokens in PEFT's files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from peer.model.errors import BadInputs
from peer.model.peft_files import CONFIG, WEIGHTS

NAME = "prompt_embeddings"


def save_prompt(prompt: torch.Tensor, config: PretrainedConfig, directory: Path, model: str) -> None:
    """As PEFT's prompt tuning does, so that `PeftModel.from_pretrained` loads it onto the model."""
    directory.mkdir(parents=True, exist_ok=True)
    told = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.shape[1],
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    save_file({NAME: prompt.detach().contiguous()}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def load_prompt(directory: Path, width: int) -> torch.Tensor:
    """Of PEFT's files. Raises BadInputs."""
    if not (directory / WEIGHTS).is_file():
        raise BadInputs(f"{directory} needs {WEIGHTS}: only safetensors are read, never a pickle")
    tensors = load_file(directory / WEIGHTS)
    if NAME not in tensors or tensors[NAME].shape[1:] != (width,):
        raise BadInputs(f"{directory} holds no prompt of tokens that are {width} wide")
    return tensors[NAME].float()
