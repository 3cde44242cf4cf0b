"""Small tokenizers made on the fly: byte-level BPE as in GPT and Llama 3, byte fallback as in Llama 2."""

from __future__ import annotations

import tempfile
from pathlib import Path

import orjson
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BEGIN, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}{{- '<|system|>' + (tools | tojson) + eos_token -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' and not message.tool_call_id -%}
        {{- raise_exception('a tool must say which call it answers') -}}
    {%- endif -%}
    {{- '<|' + message.role + '|>' + message.content | trim + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
TEXT = [
    "The petals of a flower make its corolla, and each petal is held by the ones beside it.",
    "Hello there! What would you like to know about the swarm of peers that serve this model?",
    "Grüße aus Köln, żółć, 日本語, ελληνικά and 😀 are text as well; so are\nnew lines and\ttabs.",
]


def byte_level() -> Tokenizer:
    """Every text has tokens; a character outside ASCII may be cut in the middle."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BEGIN, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Spaces are part of words, the first one is dropped, and rare characters are spelled in bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += list("▁abcdefghijklmnopqrstuvwxyzäöüé.,!?'")
    merges = [("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a")]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def chat_files(
    tokenizer: Tokenizer | None = None,
    *,
    template: str | None = TEMPLATE,
    generation: dict[str, object] | None = None,
    config: dict[str, object] | None = None,
) -> dict[str, bytes]:
    """The files that a peer of a chat model hands out."""
    tokenizer = tokenizer or byte_level()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(str(path))
        files = {"tokenizer.json": path.read_bytes()}
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = orjson.dumps(settings)
    files["generation_config.json"] = orjson.dumps(generation or {})
    files["config.json"] = orjson.dumps(config or {"model_type": "llama"})
    return files
