"""Models with random weights, made on the spot: real shapes, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from peer.settings import DEMO_MODEL

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SHAPES: dict[str, dict[str, int]] = {
    "100m": {},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}
"""What `random_llama` changes for models of about so many parameters."""


def random_llama(directory: Path, **changes: int) -> Path:
    """A Llama of about 110 million parameters with random float32 weights, saved under `directory`.

    `changes` replaces entries of the config. The tokenizer is the demo model's, so that one can chat with it.
    """
    return save_llama(directory, changes, torch.float32, "cpu")


def save_llama(directory: Path, changes: dict[str, int], dtype: torch.dtype, device: str) -> Path:
    """The same in any dtype; a GPU draws the numbers of a large model in seconds."""
    shape: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = LlamaConfig(**{**shape, **changes})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        source = Path(DEMO_MODEL) / name
        if source.exists():
            (directory / name).write_bytes(source.read_bytes())
    return directory
