"""What `--quantize` may say on which device, the compiled kernel, and what is kept on disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from peer.model import block_quant, fp16, native, packed_fp16, quantized_cache
from peer.model.block_quant import kernel
from peer.model.checkpoint import open_checkpoint
from peer.model.errors import NoKernel
from peer.model.quantization import choose
from peer.model.quantized_cache import QuantizedCache
from peer.model.span import Span
from shared.errors import SettingsError
from tests.peer.model.families import FAMILIES, random_model, random_tokens, save, tiny
from tests.peer.model.quantizations import kernels, quantization

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def name_of(
    asked: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU, exact: bool = False
) -> str:
    chosen = choose(asked, dtype, device, kernels(), exact=exact)
    return chosen.name if chosen else "none"


def test_a_cpu_takes_fp16_by_itself_unless_a_dtype_was_asked_for() -> None:
    assert packed_fp16.available()
    assert name_of("auto") == "fp16"
    assert name_of("auto", exact=True) == name_of("none") == "none"
    assert name_of("auto", torch.bfloat16) == name_of("auto", torch.bfloat16, CUDA) == "none"


def test_a_processor_of_another_kind_stays_exact_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_fp16, "available", lambda: False)

    assert name_of("auto") == "none"
    assert name_of("fp16") == "fp16"


def test_the_same_word_has_another_name_where_it_means_other_numbers() -> None:
    assert name_of("int8") == "int8"
    assert name_of("int8", torch.bfloat16, CUDA) == "llm-int8"


@pytest.mark.parametrize(
    ("asked", "dtype", "device", "sentence"),
    [
        ("int3", torch.float32, CPU, "--quantize int3 is unknown"),
        ("int8", torch.bfloat16, CPU, "leave out --dtype bfloat16"),
        ("int4", torch.bfloat16, CUDA, "on a GPU write int8 or nf4"),
        ("int8", torch.float32, torch.device("mps"), "not for mps"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(
    asked: str, dtype: torch.dtype, device: torch.device, sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence) as refusal:
        choose(asked, dtype, device, kernels())

    assert "\n" not in str(refusal.value)


def test_nf4_on_a_cpu_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert name_of("nf4") == "nf4"

    assert "several times slower" in caplog.text


# ---------------------------------------------------------------- the kernel


def test_a_kernel_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(tmp_path)
    (built,) = tmp_path.iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(native, "_build", None)

    assert kernel(tmp_path).multiply_8
    assert list(tmp_path.iterdir()) == [built]


@pytest.mark.parametrize("flags", ["-mno-avx512f", "-march=x86-64-v3"])
def test_processors_with_fewer_instructions_give_the_same_bits(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(70, 200), torch.randn(9, 200)
    compiler = tmp_path / "old-cc"
    compiler.write_text(f'#!/bin/sh\nexec cc "$@" {flags}\n')
    compiler.chmod(0o755)

    here = kernel(kernels())
    monkeypatch.setenv("CC", str(compiler))
    there = kernel(tmp_path / "kernels")

    for bits in (8, 4):
        ours, theirs = (block_quant.BlockQuantized.pack(built, bits, weight) for built in (here, there))
        assert torch.equal(ours.dense(), theirs.dense())
        assert torch.equal(ours.forward(x), theirs.forward(x))
    half, other_half = (fp16.Fp16(fp16.kernel(built), weight) for built in (kernels(), tmp_path / "kernels"))
    assert torch.equal(half.forward(x), other_half.forward(x))


@pytest.mark.parametrize("problem", ["no compiler", "no threads"])
def test_without_our_kernel_fp16_is_multiplied_by_fbgemm(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(70, 200), torch.randn(9, 200)
    ours = quantization("fp16").layers.pack(weight)
    if problem == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    else:
        compiler = tmp_path / "cc"
        compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))

    with caplog.at_level(logging.WARNING):
        chosen = choose("fp16", torch.float32, CPU, tmp_path / "kernels")

    assert chosen is not None
    assert chosen.name == "fp16"
    theirs = chosen.layers.pack(weight)
    assert isinstance(theirs, packed_fp16.PackedFp16)
    assert torch.equal(theirs.dense(), ours.dense())
    assert torch.allclose(theirs.forward(x), ours.forward(x), rtol=1e-4, atol=1e-4)
    assert "multiplied by FBGEMM" in caplog.text


def test_without_any_kernel_fp16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_fp16, "available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    with pytest.raises(SettingsError, match=r"no C compiler .* write none or int8"):
        choose("fp16", torch.float32, CPU, tmp_path / "kernels")


def test_without_a_compiler_the_sentence_tells_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    with pytest.raises(SettingsError, match=r"no C compiler on this machine .* int8 needs none"):
        choose("int4", torch.float32, CPU, tmp_path / "kernels")


def test_a_compiler_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))

    with pytest.raises(NoKernel, match=r"error: no such thing") as refusal:
        kernel(tmp_path / "kernels")

    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "kernels").iterdir()) == []


# ---------------------------------------------------------------- on disk


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save(random_model(FAMILIES["llama"]()), tmp_path / "model")
    return tmp_path / "model"


def load(directory: Path, cache: Path, name: str = "int4", start: int = 0, end: int = 6) -> Span:
    return Span.load(
        open_checkpoint(str(directory)),
        start,
        end,
        quantization=quantization(name),
        quantized=QuantizedCache(cache),
    )


def run(span: Span, tokens: torch.Tensor) -> torch.Tensor:
    return span.forward(tokens, span.new_cache(0, 6, 64), 0, all_logits=True)


def test_quantized_layers_are_not_read_again(directory: Path, tmp_path: Path) -> None:
    first = load(directory, tmp_path / "cache")
    again = load(directory, tmp_path / "cache")
    tokens = random_tokens(1, 9)

    assert again.bytes_read < first.bytes_read / 10
    assert torch.equal(run(first, tokens), run(again, tokens))
    assert first.weights_bytes == again.weights_bytes


def test_another_span_takes_the_layers_that_are_there(directory: Path, tmp_path: Path) -> None:
    load(directory, tmp_path / "cache", start=2, end=4)
    assert sorted(file.stem for file in (tmp_path / "cache").iterdir()) == ["layer-2", "layer-3"]

    whole, fresh = load(directory, tmp_path / "cache"), load(directory, tmp_path / "other")

    assert whole.bytes_read < fresh.bytes_read
    tokens = random_tokens(1, 9)
    assert torch.equal(run(whole, tokens), run(fresh, tokens))


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_a_head_without_weights_of_its_own_gets_some(name: str, tmp_path: Path) -> None:
    model = tiny("qwen3")
    tokens, cache = random_tokens(1, 9), QuantizedCache(tmp_path)
    results = []
    for _ in range(2):
        first, last = (
            Span.load(model.checkpoint, start, end, quantization=quantization(name), quantized=cache)
            for start, end in ((0, 3), (3, 6))
        )
        states = first.forward(tokens, first.new_cache(0, 3, 9), 0)
        results.append(last.forward(states, last.new_cache(3, 6, 9), 0))
        # The embedding itself is not kept where nobody looks tokens up.
        assert last.weights_bytes < first.weights_bytes + 2 * 96 * 32

    assert torch.equal(*results)


def test_fp16_needs_no_files(directory: Path, tmp_path: Path) -> None:
    load(directory, tmp_path / "cache", "fp16")

    assert not (tmp_path / "cache").exists()


def test_files_that_are_cut_short_are_made_anew(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = random_tokens(1, 9)
    expected = run(load(directory, tmp_path / "cache"), tokens)
    file = tmp_path / "cache" / "layer-3.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])

    assert torch.equal(run(load(directory, tmp_path / "cache"), tokens), expected)
    assert "layer-3.safetensors cannot be read and is made anew" in caplog.text
    assert file.read_bytes() == whole


def test_a_disk_that_takes_nothing_costs_nothing_else(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(quantized_cache, "_write", full)

    span = load(directory, tmp_path / "cache")

    assert torch.isfinite(run(span, random_tokens(1, 3))).all()
    assert "could not be kept" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []
