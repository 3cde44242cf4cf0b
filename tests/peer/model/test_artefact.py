"""One name for one set of weights, whichever way its files lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from peer.model.artefact import artefact_id
from peer.model.checkpoint import open_checkpoint
from tests.peer.model.families import FAMILIES, random_model, save


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tiny model and something like a tokenizer."""
    directory = tmp_path / "model"
    save(random_model(FAMILIES["llama"]()), directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def name_of(directory: Path, dtype: str = "float32", quantization: str | None = None) -> str:
    return artefact_id(open_checkpoint(str(directory)), dtype, quantization)


def change_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=7))


def test_a_name_is_64_hex_digits_and_stays(model: Path) -> None:
    assert len(bytes.fromhex(name_of(model))) == 32
    assert name_of(model) == name_of(model)


def test_the_same_files_elsewhere_have_the_same_name(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "another" / "place")

    assert name_of(tmp_path / "another" / "place") == name_of(model)


def test_the_same_tensors_in_several_files_have_the_same_name(model: Path, tmp_path: Path) -> None:
    save(random_model(FAMILIES["llama"]()), tmp_path / "split", max_shard_size="60KB")
    (tmp_path / "split" / "tokenizer.json").write_text("{}")

    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert name_of(tmp_path / "split") == name_of(model)


def test_keys_that_compute_nothing_do_not_count(model: Path) -> None:
    before = name_of(model)

    change_config(model, transformers_version="0.0.1", _name_or_path="elsewhere", use_cache=False)

    assert name_of(model) == before


def test_other_weights_have_another_name(model: Path) -> None:
    before = name_of(model)
    other = random_model(FAMILIES["llama"]())
    with torch.no_grad():
        other.model.layers[4].mlp.up_proj.weight.mul_(1.001)

    save(other, model)

    assert name_of(model) != before


def test_another_config_tokenizer_or_precision_has_another_name(model: Path) -> None:
    names = {name_of(model), name_of(model, "bfloat16"), name_of(model, quantization="int8")}
    change_config(model, rms_norm_eps=1e-5)
    names.add(name_of(model))
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    names.add(name_of(model))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    names.add(name_of(model))

    assert len(names) == 6


def test_naming_reads_no_tensor_whole(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))

    artefact_id(checkpoint, "float32", None)

    assert checkpoint.bytes_read == 0
