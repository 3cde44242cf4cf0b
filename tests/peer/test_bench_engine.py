"""`bench.engine` measures a GPU through functions that a CPU takes as well."""

from __future__ import annotations

from argparse import Namespace

import pytest

from bench import engine, gpu, models

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}


def test_spans_of_some_layers_and_of_all_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    monkeypatch.setattr(gpu, "COPIED", 1 << 20)

    found = engine.on_gpu("tiny", Namespace(device="cpu", tokens=2, rounds=1))

    spans = ["bf16, 2 layers", "bf16, 3 layers", "nf4, 2 layers", "nf4, 3 layers"]
    assert list(found) == ["bytes_vs_copy", "tokens_per_s_1", "tokens_per_s_16", "tokens_per_s_64"]
    for figures in found.values():
        assert list(figures) == spans
        assert all(figure > 0 for figure in figures.values())
