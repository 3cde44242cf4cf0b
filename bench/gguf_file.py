"""Write a Llama checkpoint as the GGUF file that llama.cpp reads: the same weights at 8 or 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peer.model.checkpoint import open_checkpoint

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Path, file: Path, kind: str) -> Path:
    """`kind` is F32, Q8_0 or Q4_0. With both of these embedding and head have 8 bits, as our own head."""
    import gguf

    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    checkpoint = open_checkpoint(str(model))
    for name in sorted(checkpoint.tensor_names):
        tensor = _as_llama_cpp(name, checkpoint.read(name).float(), config)
        at_the_ends = name.removesuffix(".weight") in ENDS
        wanted = "F32" if tensor.ndim == 1 else "Q8_0" if at_the_ends and kind != "F32" else kind
        form = gguf.GGMLQuantizationType[wanted]
        writer.add_tensor(_name(name), gguf.quants.quantize(tensor, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _name(name: str) -> str:
    path = name.removesuffix(".weight")
    if path in ENDS:
        return f"{ENDS[path]}.weight"
    _, _, layer, part = path.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _as_llama_cpp(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """llama.cpp turns neighbours of a query or key where transformers turns halves, so rows change places."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            split = tensor.view(config[heads], 2, -1, tensor.shape[1])
            tensor = split.transpose(1, 2).reshape(tensor.shape)
    array: np.ndarray[Any, Any] = tensor.contiguous().numpy()
    return array
