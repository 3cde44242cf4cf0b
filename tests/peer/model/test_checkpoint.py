"""Where tensors come from: a directory or the hub, and what is fetched and read of either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants
from safetensors.torch import save_file

from peer.model.artefact import artefact_id
from peer.model.checkpoint import MAX_TOKENIZER_BYTES, open_checkpoint, text_name, tokenizer_files
from peer.model.errors import ModelNotFound, UnsupportedModel
from peer.model.span import Span
from tests.peer.model.families import FAMILIES, LAYERS, random_model, save
from tests.peer.model.hub import Hub


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny model in several files, with a tokenizer of sorts."""
    path = tmp_path / "tiny-llama"
    save(random_model(FAMILIES["llama"]()), path, max_shard_size="60KB")
    (path / "tokenizer.json").write_text('{"a": 1}')
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    (path / "README.md").write_text("words")
    return path


@pytest.fixture
def hub(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The same model on a hub."""
    with Hub("someone/tiny-llama", directory).running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub
    close_session()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()


# ---------------------------------------------------------------- a directory


def test_a_directory_opens_without_reading_a_tensor(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))

    assert (checkpoint.name, checkpoint.layer_count) == ("tiny-llama", LAYERS)
    assert checkpoint.config.hidden_size == 32
    assert checkpoint.total_bytes == sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert checkpoint.bytes_read == 0


def test_a_tensor_is_read_and_counted(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    stored = checkpoint.tensor("model.norm.weight")

    tensor = checkpoint.read("model.norm.weight")

    assert (tensor.shape, tensor.dtype) == (stored.shape, torch.float32)
    assert checkpoint.bytes_read == stored.bytes == 128


def test_tokenizer_files_are_those_that_exist(directory: Path) -> None:
    files = tokenizer_files(open_checkpoint(str(directory)))

    assert set(files) == {"config.json", "generation_config.json", "tokenizer.json"}
    assert files["tokenizer.json"] == b'{"a": 1}'


def test_tokenizer_files_without_end_are_refused(directory: Path) -> None:
    with (directory / "vocab.json").open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)

    with pytest.raises(UnsupportedModel, match="tokenizer files of tiny-llama"):
        tokenizer_files(open_checkpoint(str(directory)))


def test_a_directory_without_a_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"there is no config\.json"):
        open_checkpoint(str(tmp_path))


def test_pickles_are_never_read(directory: Path) -> None:
    for file in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        file.unlink()

    with pytest.raises(ModelNotFound, match="only safetensors are read, never a pickle"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "frobnicator"}, "does not know the family frobnicator"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}, "does not know the family x"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"stored quantized \(gptq\)"),
        ({"is_encoder_decoder": True}, "has an encoder"),
    ],
)
def test_configs_that_are_not_served_are_refused(
    directory: Path, change: dict[str, object], reason: str
) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        open_checkpoint(str(directory))

    assert "\n" not in str(refusal.value)


def test_an_index_cannot_lead_out_of_the_directory(directory: Path) -> None:
    save_file({"secret": torch.zeros(1)}, directory.parent / "secret.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"secret": "../secret.safetensors"}}))

    with pytest.raises(ModelNotFound, match="has no file"):
        open_checkpoint(str(directory)).read("secret")


def test_weights_in_eight_bit_floats_are_refused_by_name(directory: Path) -> None:
    save_file({"norm": torch.zeros(2).to(torch.float8_e4m3fn)}, directory / "model.safetensors")
    (directory / "model.safetensors.index.json").unlink()

    with pytest.raises(UnsupportedModel, match="stores norm as F8_E4M3"):
        open_checkpoint(str(directory)).read("norm")


def test_a_file_that_was_cut_short_is_told_before_it_is_used(directory: Path) -> None:
    file = next(directory.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    checkpoint = open_checkpoint(str(directory))

    with pytest.raises(UnsupportedModel, match=f"{file.name} is cut short"):
        artefact_id(checkpoint, "float32", None)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"no"])
def test_a_file_of_another_kind_is_told(directory: Path, content: bytes) -> None:
    next(directory.glob("*.safetensors")).write_bytes(content)

    with pytest.raises(UnsupportedModel, match="is no safetensors file"):
        artefact_id(open_checkpoint(str(directory)), "float32", None)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("language_model.model.layers.0.w", "model.layers.0.w"),
        ("model.language_model.layers.0.w", "model.layers.0.w"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.w", "model.vision_tower.w"),
    ],
)
def test_text_tensors_of_a_larger_model_lose_their_prefix(stored: str, name: str) -> None:
    assert text_name(stored) == name


# ---------------------------------------------------------------- the hub


def test_opening_a_model_of_the_hub_fetches_no_weights(hub: Hub) -> None:
    checkpoint = open_checkpoint("someone/tiny-llama")

    assert (checkpoint.name, checkpoint.layer_count) == ("someone/tiny-llama", LAYERS)
    assert len(tokenizer_files(checkpoint)) == 3
    assert checkpoint.total_bytes == sum(file.stat().st_size for file in hub.directory.glob("*.safetensors"))
    assert sorted(hub.fetched) == [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_a_span_fetches_only_the_files_that_hold_its_tensors(hub: Hub) -> None:
    checkpoint = open_checkpoint("someone/tiny-llama")
    told: list[tuple[int, int]] = []
    hub.fetched.clear()

    Span.load(checkpoint, 2, 3, progress=lambda done, total: told.append((done, total)))

    index = json.loads((hub.directory / "model.safetensors.index.json").read_text())
    wanted = {file for name, file in index["weight_map"].items() if ".layers.2." in name}
    assert set(hub.fetched) == wanted
    assert len(hub.fetched) < len(list(hub.directory.glob("*.safetensors")))
    downloaded = sum((hub.directory / file).stat().st_size for file in wanted)
    assert (downloaded, downloaded) in told


def test_what_was_fetched_serves_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_checkpoint("someone/tiny-llama")
    Span.load(online, 2, 3)
    hub.fetched.clear()
    go_offline(monkeypatch)

    checkpoint = open_checkpoint("someone/tiny-llama")

    assert artefact_id(checkpoint, "float32", None) == artefact_id(online, "float32", None)
    assert Span.load(checkpoint, 2, 3).bytes_read > 0
    with pytest.raises(ModelNotFound, match="could not be fetched from the hub"):
        Span.load(checkpoint, 0, LAYERS)
    assert hub.fetched == []


def test_changed_weights_on_the_hub_have_another_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = artefact_id(open_checkpoint("someone/tiny-llama"), "float32", None)
    save(random_model(FAMILIES["llama"](), seed=5), hub.directory, max_shard_size="60KB")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh cache"))

    assert artefact_id(open_checkpoint("someone/tiny-llama"), "float32", None) != before


@pytest.mark.parametrize("name", ["someone/else", "no such directory", "/no/such/directory", "../x"])
def test_an_unknown_name_is_not_found_in_one_sentence(hub: Hub, name: str) -> None:
    with pytest.raises(ModelNotFound) as refusal:
        open_checkpoint(name)

    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_offline_without_a_copy_is_not_found(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)

    with pytest.raises(ModelNotFound, match="someone/tiny-llama is not a directory here"):
        open_checkpoint("someone/tiny-llama")


def test_a_hub_that_cannot_be_reached_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(ModelNotFound, match="someone/tiny-llama is not a directory here"):
        open_checkpoint("someone/tiny-llama")


def test_weights_that_the_hub_no_longer_has_are_told(hub: Hub) -> None:
    checkpoint = open_checkpoint("someone/tiny-llama")
    for file in hub.directory.glob("*.safetensors"):
        file.unlink()

    with pytest.raises(ModelNotFound, match="could not be fetched from the hub"):
        Span.load(checkpoint, 2, 3)
