"""Tiny models with random weights, one per family: six layers, float32, saved as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

LAYERS = 6
VOCABULARY = 128

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE),
    "falcon-7b": FalconConfig(
        **_FALCON, multi_query=True, parallel_attn=True, new_decoder_architecture=False
    ),
    "falcon-alibi": FalconConfig(**_FALCON, alibi=True, multi_query=False, parallel_attn=False),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=LAYERS, n_head=4),
    # Windows shorter than the conversations of the tests, so that they matter.
    "mistral": MistralConfig(**_SHAPE, sliding_window=16),
    "mixtral": MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": Gemma3TextConfig(**_SHAPE, sliding_window=16),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=LAYERS, n_head=4, n_positions=512),
}


def save_random(family: str, directory: Path, *, seed: int = 0) -> Path:
    """A model of the family with random weights, as a directory that `--model` takes."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        FAMILIES[family], dtype=torch.float32
    )
    # Untrained weights give almost flat logits; larger ones make greedy choices clear and varied.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    model.save_pretrained(directory)
    return directory
