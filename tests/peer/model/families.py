"""Tiny models of many families, with random weights, and what transformers itself says they compute."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from peer.model.checkpoint import Checkpoint, open_checkpoint
from peer.model.kv_cache import KVCache
from peer.model.span import Span

# The models are so small that a second thread only waits.
torch.set_num_threads(1)

Model: TypeAlias = Any
"""transformers' own models and their factories, which are only partly typed."""

LAYERS = 6
VOCAB = 96
WINDOW = 8
CONTEXT = 600
CAPACITY = 64
CUTS = (0, 1, 4, LAYERS)
"""Where the three spans of every test model begin and end: uneven, and one with a single layer."""


def config_of(kind: str, **sizes: object) -> PretrainedConfig:
    """A family's config; each family has its own names for its sizes."""
    build: Any = CONFIG_MAPPING[kind]
    config: PretrainedConfig = build(**sizes)
    return config


def _modern(kind: str, **special: object) -> PretrainedConfig:
    """A family that names its sizes as Llama does. `None` leaves a size out."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    chosen = {name: value for name, value in {**sizes, **special}.items() if value is not None}
    return config_of(kind, **chosen)


def _early(kind: str, **special: object) -> PretrainedConfig:
    """A family that names its sizes as GPT-2 does."""
    sizes = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCAB, "n_positions": CONTEXT}
    return config_of(kind, **{**sizes, **special})


ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
SLIDING = {"sliding_window": WINDOW, "layer_types": ALTERNATING}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FALCON = {"intermediate_size": None, "num_key_value_heads": None}

NAMED: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _modern("llama"),
    "qwen3": lambda: _modern("qwen3", head_dim=8, tie_word_embeddings=True),
    "falcon-7b": lambda: _modern("falcon", multi_query=True, parallel_attn=True, **FALCON),
    "falcon-40b": lambda: _modern("falcon", new_decoder_architecture=True, num_kv_heads=2, **FALCON),
    "falcon-alibi": lambda: _modern(
        "falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True, **FALCON
    ),
    "bloom": lambda: config_of("bloom", hidden_size=32, n_layer=LAYERS, n_head=4, vocab_size=VOCAB),
    "mistral": lambda: _modern("mistral", sliding_window=WINDOW, head_dim=8),
    "mixtral": lambda: _modern("mixtral", num_local_experts=4),
    "gemma3": lambda: _modern("gemma3_text", head_dim=8, **SLIDING),
    "gpt2": lambda: _early("gpt2"),
}

WIDER: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2": lambda: _modern("qwen2"),
    "qwen2-moe": lambda: _modern("qwen2_moe", shared_expert_intermediate_size=24, **EXPERTS),
    "qwen3-moe": lambda: _modern("qwen3_moe", head_dim=8, **EXPERTS),
    "gemma": lambda: _modern("gemma", head_dim=8),
    "gemma2": lambda: _modern("gemma2", head_dim=8, **SLIDING),
    "gemma4": lambda: _modern(
        "gemma4_text",
        head_dim=8,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        **SLIDING,
    ),
    "vaultgemma": lambda: _modern("vaultgemma", head_dim=8, **SLIDING),
    "phi": lambda: _modern("phi"),
    "phi3": lambda: _modern("phi3"),
    "phimoe": lambda: _modern("phimoe", num_local_experts=4),
    "gpt-neox": lambda: _modern("gpt_neox", num_key_value_heads=None),
    "gpt-j": lambda: _early("gptj", rotary_dim=4),
    "gpt-neo": lambda: config_of(
        "gpt_neo",
        hidden_size=32,
        num_layers=LAYERS,
        num_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], LAYERS // 2]],
        window_size=WINDOW,
    ),
    "codegen": lambda: _early("codegen", rotary_dim=4),
    "ctrl": lambda: _early("ctrl", dff=48),
    "gpt-bigcode": lambda: _early("gpt_bigcode"),
    "opt": lambda: _modern("opt", ffn_dim=48, word_embed_proj_dim=32, num_key_value_heads=None),
    "opt-350m": lambda: _modern(
        "opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False, num_key_value_heads=None
    ),
    "mpt": lambda: config_of(
        "mpt", d_model=32, n_heads=4, n_layers=LAYERS, vocab_size=VOCAB, max_seq_len=CONTEXT
    ),
    "stablelm": lambda: _modern("stablelm"),
    "starcoder2": lambda: _modern("starcoder2"),
    "cohere": lambda: _modern("cohere"),
    "cohere2": lambda: _modern("cohere2", **SLIDING),
    "olmo": lambda: _modern("olmo"),
    "olmo2": lambda: _modern("olmo2"),
    "olmo3": lambda: _modern("olmo3", **SLIDING),
    "olmoe": lambda: _modern("olmoe", num_experts=4, num_experts_per_tok=2),
    "granite": lambda: _modern(
        "granite", embedding_multiplier=12.0, logits_scaling=3.0, residual_multiplier=0.3
    ),
    "granite-moe": lambda: _modern("granitemoe", num_local_experts=4, embedding_multiplier=12.0),
    "deepseek-v2": lambda: _modern("deepseek_v2", **{**LATENT, **ROUTED, "q_lora_rank": None}),
    "deepseek-v3": lambda: _modern("deepseek_v3", **LATENT, **ROUTED),
    "glm": lambda: _modern("glm", head_dim=8),
    "glm4": lambda: _modern("glm4", head_dim=8),
    "glm4-moe": lambda: _modern("glm4_moe", head_dim=8, **ROUTED),
    "gpt-oss": lambda: _modern("gpt_oss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, **SLIDING),
    "smollm3": lambda: _modern("smollm3"),
    "exaone4": lambda: _modern("exaone4", **SLIDING),
    "llama4": lambda: _modern(
        "llama4_text",
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=4,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"] * (LAYERS // 2),
    ),
    "nemotron": lambda: _modern("nemotron"),
    "persimmon": lambda: _modern("persimmon"),
    "hunyuan": lambda: _modern("hunyuan_v1_dense", head_dim=8),
    "minimax-m2": lambda: _modern("minimax_m2", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "seed-oss": lambda: _modern("seed_oss", head_dim=8),
    "apertus": lambda: _modern("apertus"),
    "arcee": lambda: _modern("arcee"),
    "biogpt": lambda: _modern("biogpt"),
    "xglm": lambda: config_of(
        "xglm",
        d_model=32,
        ffn_dim=48,
        num_layers=LAYERS,
        attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
    ),
    "helium": lambda: _modern("helium", head_dim=8),
    "diffllama": lambda: _modern("diffllama"),
    "ministral": lambda: _modern("ministral", head_dim=8, **SLIDING),
}


COUPLED: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-dynamic": lambda: _modern(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama-longrope": lambda: _modern(
        "llama",
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": CONTEXT // 2,
        },
    ),
}
"""Families whose positions depend on the longest text of a pass."""

FAMILIES = NAMED | WIDER | COUPLED
"""`WIDER` has something of every kind in masks, positions, norms, routed layers and names."""


@dataclass(frozen=True)
class Tiny:
    """One tiny model three times: its files, transformers' own whole model, and three spans of ours."""

    directory: Path
    whole: Model
    checkpoint: Checkpoint
    spans: Sequence[Span]

    def caches(self) -> list[KVCache]:
        """A fresh session: one cache per span."""
        return [span.new_cache(span.start, span.end, CAPACITY) for span in self.spans]

    def run(
        self, caches: Sequence[KVCache], inputs: torch.Tensor, position: int, *, all_logits: bool = True
    ) -> torch.Tensor:
        """Through all spans, one after another."""
        for span, cache in zip(self.spans, caches, strict=True):
            inputs = span.forward(inputs, cache, position, all_logits=all_logits)
        return inputs

    def expected(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, count, vocab] of the whole model, without any cache."""
        with torch.inference_mode():
            logits: torch.Tensor = self.whole(tokens).logits
        return logits


def random_model(config: PretrainedConfig, seed: int = 0) -> Model:
    """A model of that config whose every weight matters, norms and biases included."""
    torch.manual_seed(seed)
    auto: Model = AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.05)
    return model


def stored_model(directory: Path, dtype: torch.dtype = torch.float32) -> Model:
    """What transformers itself makes of a directory."""
    auto: Model = AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=dtype).eval()


def save(model: Model, directory: Path, **options: object) -> None:
    """As safetensors, without a progress bar."""
    bars: Model = logging
    bars.disable_progress_bar()
    model.save_pretrained(directory, **options)


def random_tokens(*shape: int) -> torch.Tensor:
    """Token ids that are no special tokens."""
    return torch.randint(3, VOCAB, shape)


@functools.cache
def tiny(family: str) -> Tiny:
    """Built once per family and process; the files stay until the process ends."""
    directory = Path(_TEMPORARY.name, family)
    save(random_model(FAMILIES[family]()), directory)
    checkpoint = open_checkpoint(str(directory))
    spans = [Span.load(checkpoint, start, end) for start, end in itertools.pairwise(CUTS)]
    return Tiny(directory, stored_model(directory), checkpoint, spans)


_TEMPORARY = tempfile.TemporaryDirectory(prefix="corolla-tiny-")


def every_family(*, but: Collection[str] = ()) -> list[Any]:
    """Parameters for a test: the few of `NAMED`, and the wider circle where slow tests run."""
    return [
        pytest.param(name, marks=() if name in NAMED else pytest.mark.slow)
        for name in (*NAMED, *WIDER)
        if name not in but
    ]
