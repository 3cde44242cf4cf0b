"""What a span reads, refuses and reports, and how it behaves at its edges."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForConditionalGeneration

from peer.model.checkpoint import open_checkpoint
from peer.model.errors import BadInputs, CacheFull, UnsupportedModel
from peer.model.kv_cache import GROWTH
from peer.model.span import Span
from tests.peer.model.families import (
    CONTEXT,
    FAMILIES,
    LAYERS,
    VOCAB,
    Model,
    config_of,
    random_model,
    random_tokens,
    save,
    stored_model,
    tiny,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("file_size", ["1GB", "60KB"], ids=["one file", "several files with an index"])
def test_a_third_of_the_layers_reads_about_a_third_of_the_bytes(tmp_path: Path, file_size: str) -> None:
    save(random_model(FAMILIES["llama"]()), tmp_path, max_shard_size=file_size)
    checkpoint = open_checkpoint(str(tmp_path))
    ends_bytes = 2 * VOCAB * 32 * 4
    assert (tmp_path / "model.safetensors.index.json").exists() == (file_size == "60KB")

    middle = Span.load(checkpoint, 2, 4)

    assert middle.bytes_read == checkpoint.bytes_read
    assert middle.bytes_read <= (checkpoint.total_bytes - ends_bytes) / 3
    assert middle.bytes_read > 0.9 * (checkpoint.total_bytes - ends_bytes) / 3


def test_three_spans_together_read_every_tensor_once() -> None:
    model = tiny("llama")

    read = sum(span.bytes_read for span in model.spans)

    assert read == sum(model.checkpoint.tensor(name).bytes for name in model.checkpoint.tensor_names)


def test_tied_embeddings_are_read_by_the_first_span_and_by_the_last() -> None:
    model = tiny("gpt2")
    table = model.checkpoint.tensor("transformer.wte.weight").bytes

    read = sum(span.bytes_read for span in model.spans)

    total = sum(model.checkpoint.tensor(name).bytes for name in model.checkpoint.tensor_names)
    assert read == total + table
    assert Span.load(model.checkpoint, 0, LAYERS).weights_bytes < total + table


def test_progress_rises_to_the_bytes_that_were_read() -> None:
    told: list[tuple[int, int]] = []

    span = Span.load(
        tiny("mixtral").checkpoint, 1, 3, progress=lambda done, total: told.append((done, total))
    )

    assert told == sorted(told)
    assert told[-1] == (span.bytes_read, span.bytes_read)


def test_the_text_part_of_a_text_and_image_checkpoint_is_served(tmp_path: Path) -> None:
    text = FAMILIES["gemma3"]()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = config_of("gemma3", text_config=text.to_dict(), vision_config={**vision, "image_size": 28})
    build: Model = Gemma3ForConditionalGeneration
    whole = build(config).eval()
    save(whole, tmp_path)
    tokens = random_tokens(1, 20)

    span = Span.load(open_checkpoint(str(tmp_path)), 0, LAYERS)
    logits = span.forward(tokens, span.new_cache(0, LAYERS, 20), 0, all_logits=True)

    with torch.inference_mode():
        torch.testing.assert_close(logits, whole(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what is computed


def test_only_the_last_position_gives_logits_unless_all_are_asked_for() -> None:
    model = tiny("llama")
    tokens = random_tokens(2, 9)

    logits = model.run(model.caches(), tokens, 0, all_logits=False)

    assert logits.shape == (2, VOCAB)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.expected(tokens)[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_equal_the_whole_model_in_that_precision(dtype: torch.dtype) -> None:
    model = tiny("llama")
    whole = stored_model(model.directory, dtype)
    tokens = random_tokens(1, 9)
    states = tokens

    for start, end in ((0, 3), (3, LAYERS)):
        span = Span.load(model.checkpoint, start, end, dtype=dtype)
        states = span.forward(states, span.new_cache(start, end, 9), 0, all_logits=True)

    with torch.inference_mode():
        torch.testing.assert_close(states, whole(tokens).logits.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_a_session_longer_than_one_growth_of_its_buffers(family: str) -> None:
    model = tiny(family)
    length = 2 * GROWTH + 30
    tokens = random_tokens(1, length)
    span = Span.load(model.checkpoint, 0, LAYERS)
    cache = span.new_cache(0, LAYERS, length)

    pieces = [
        span.forward(tokens[:, start : start + 90], cache, start, all_logits=True)
        for start in range(0, length, 90)
    ]

    torch.testing.assert_close(torch.cat(pieces, 1), model.expected(tokens), rtol=1e-4, atol=1e-5)


def test_two_sessions_on_one_span_do_not_disturb_each_other() -> None:
    model = tiny("mistral")
    ours, theirs = random_tokens(1, 20), random_tokens(1, 20)
    our_caches, their_caches = model.caches(), model.caches()

    for position in range(20):
        our_logits = model.run(our_caches, ours[:, position : position + 1], position)
        their_logits = model.run(their_caches, theirs[:, position : position + 1], position)

    torch.testing.assert_close(our_logits, model.expected(ours)[:, -1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(their_logits, model.expected(theirs)[:, -1:], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what it reports


def test_a_span_tells_its_sizes() -> None:
    span = tiny("llama").spans[1]

    assert (span.start, span.end, span.layer_count) == (1, 4, LAYERS)
    assert (span.hidden_size, span.vocab_size, span.context_length) == (32, VOCAB, CONTEXT)
    assert span.dtype == torch.float32
    assert span.weights_bytes == pytest.approx(span.bytes_read, rel=0.01)


def test_cache_memory_per_position_is_what_a_session_takes() -> None:
    model = tiny("gemma4")
    span = Span.load(model.checkpoint, 0, LAYERS)
    cache = span.new_cache(0, LAYERS, 40)

    span.forward(random_tokens(1, 1), cache, 0)

    assert span.kv_bytes_per_token(0, LAYERS) * 40 == cache.bytes
    # Its full-attention layers have wider heads than its sliding ones.
    assert span.kv_bytes_per_token(0, 1) != span.kv_bytes_per_token(1, 2)


# ---------------------------------------------------------------- what it refuses


def test_a_gap_in_the_positions_is_refused_and_the_session_goes_on() -> None:
    model = tiny("llama")
    span, cache = model.spans[0], model.caches()[0]
    span.forward(random_tokens(1, 5), cache, 0)

    with pytest.raises(BadInputs, match="position 7 leaves a gap: the cache holds 5"):
        span.forward(random_tokens(1, 1), cache, 7)

    span.forward(random_tokens(1, 1), cache, 5)
    assert cache.length == 6


def test_a_session_never_grows_over_its_capacity() -> None:
    span = tiny("llama").spans[0]
    cache = span.new_cache(0, 1, 10)
    span.forward(random_tokens(1, 8), cache, 0)

    with pytest.raises(CacheFull, match="11 positions do not fit"):
        span.forward(random_tokens(1, 3), cache, 8)
    span.forward(random_tokens(1, 2), cache, 8)

    assert cache.length == cache.capacity == 10


def test_a_step_that_fails_half_way_can_be_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    tokens = random_tokens(1, 6)
    caches = model.caches()
    span = model.spans[1]
    last = span._model.model.layers[3].mlp

    with monkeypatch.context() as broken:
        broken.setattr(last, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.run(caches, tokens, 0)

    logits = model.run(caches, tokens, 0)
    torch.testing.assert_close(logits, model.expected(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.tensor([[VOCAB]]),
        torch.tensor([[-1]]),
        torch.tensor([5]),
        torch.ones(1, 2, 32),
        torch.empty(1, 0, dtype=torch.int64),
    ],
    ids=["token past the vocabulary", "negative token", "no batch", "hidden states", "nothing"],
)
def test_inputs_that_are_no_tokens_are_refused_by_the_first_layers(inputs: torch.Tensor) -> None:
    model = tiny("llama")

    with pytest.raises(BadInputs):
        model.spans[0].forward(inputs, model.caches()[0], 0)


@pytest.mark.parametrize("inputs", [torch.ones(1, 2, 31), torch.ones(2, 32), torch.ones(1, 2, 32).int()])
def test_inputs_that_are_no_hidden_states_are_refused_by_later_layers(inputs: torch.Tensor) -> None:
    model = tiny("llama")

    with pytest.raises(BadInputs, match=r"layer 1 takes hidden states \[batch, count, 32\]"):
        model.spans[1].forward(inputs, model.caches()[1], 0)


def test_another_batch_than_the_cache_began_with_is_refused() -> None:
    model = tiny("llama")
    cache = model.caches()[0]
    model.spans[0].forward(random_tokens(1, 3), cache, 0)

    with pytest.raises(BadInputs, match="batch"):
        model.spans[0].forward(random_tokens(2, 3), cache, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_session_never_grows_over_the_models_context(family: str) -> None:
    span = tiny(family).spans[0]
    cache = span.new_cache(0, 1, CONTEXT + 10)
    span.forward(random_tokens(1, CONTEXT), cache, 0)

    with pytest.raises(CacheFull, match=f"{CONTEXT + 1} positions are more than this model's {CONTEXT}"):
        span.forward(random_tokens(1, 1), cache, CONTEXT)


def test_layers_outside_the_span_are_refused() -> None:
    span = tiny("llama").spans[1]

    with pytest.raises(ValueError, match="layers 0:4 are not in this span, which holds 1:4"):
        span.new_cache(0, 4, 10)


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("mamba", {}, "keep a recurrent state"),
        ("rwkv", {}, "keep a recurrent state"),
        ("jamba", {"intermediate_size": 48}, "keep a recurrent state"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_attention_heads": 4}, "recurrent state"),
        ("openai-gpt", {"n_head": 4}, "without keys and values"),
        ("bert", {"intermediate_size": 48, "num_attention_heads": 4}, "look ahead"),
        ("xlm", {"emb_dim": 32, "n_heads": 4, "n_layers": 2}, "compute something between their layers"),
        (
            "gemma4_text",
            {"num_attention_heads": 4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
            "fed by more than hidden states",
        ),
        (
            "gemma4_text",
            {
                "num_attention_heads": 4,
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 1,
                "layer_types": ["full_attention", "full_attention"],
            },
            "share keys and values",
        ),
    ],
)
def test_a_family_that_cannot_be_cut_is_refused_in_one_sentence(
    tmp_path: Path, kind: str, sizes: dict[str, object], reason: str
) -> None:
    config = config_of(kind, hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, **sizes)
    save(random_model(config), tmp_path)

    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        Span.load(open_checkpoint(str(tmp_path)), 0, 1)

    assert "\n" not in str(refusal.value)


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"]())
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 47, bias=False)
    save(model, tmp_path)

    with pytest.raises(UnsupportedModel, match=r"up_proj.weight is \[47, 32\] in the checkpoint"):
        Span.load(open_checkpoint(str(tmp_path)), 0, 2)


def test_tensors_that_cannot_be_joined_are_named(tmp_path: Path) -> None:
    model = random_model(FAMILIES["qwen3-moe"]())
    directory = tmp_path / "saved"
    save(model, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, directory / "model.safetensors")

    with pytest.raises(UnsupportedModel, match=r"layers.1.mlp.* does not fit its family") as refusal:
        Span.load(open_checkpoint(str(directory)), 0, 2)

    assert "\n" not in str(refusal.value)


def test_a_checkpoint_of_the_bare_model_is_served(tmp_path: Path) -> None:
    """The names of the first GPT-2 on the hub: without the prefix that the model with a head has."""
    model = tiny("gpt2")
    tensors = load_file(model.directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    shutil.copy(model.directory / "config.json", tmp_path)
    tokens = states = random_tokens(1, 9)

    for start, end in ((0, 3), (3, LAYERS)):
        span = Span.load(open_checkpoint(str(tmp_path)), start, end)
        states = span.forward(states, span.new_cache(start, end, 9), 0, all_logits=True)

    torch.testing.assert_close(states, model.expected(tokens), rtol=1e-5, atol=1e-5)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    model = random_model(config)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    save(model, tmp_path, state_dict=kept)

    with pytest.raises(UnsupportedModel, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        Span.load(open_checkpoint(str(tmp_path)), 0, 2)
    assert Span.load(open_checkpoint(str(tmp_path)), 2, 4).layer_count == LAYERS
