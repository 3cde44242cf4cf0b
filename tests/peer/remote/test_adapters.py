"""Adapters that peers host, and those that were trained through a swarm, are those of PEFT."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peer.model.errors import BadInputs
from peer.model.peft_files import open_adapter
from shared.client.session import Request
from tests.harness.swarm import Swarm, tokens
from tests.peer.model.families import LAYERS, random_tokens, tiny
from tests.peer.remote.room import Room, close

Model = Any


def adapted(whole: Model, **options: Any) -> Model:  # noqa: ANN401
    """The model with LoRA by PEFT, of numbers that matter."""
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    model: Model = get_peft_model(copy.deepcopy(whole), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Model]]:
    model = adapted(tiny("llama").whole, use_rslora=True)
    directory = tmp_path_factory.mktemp("adapters") / "pirate"
    model.save_pretrained(directory)
    yield directory, model


def test_peft_s_files_give_peft_s_logits(stored: tuple[Path, Model]) -> None:
    directory, whole = stored
    ids = random_tokens(2, 9)
    with Room(tiny("llama").directory, ann=(0, 2), bob=(2, LAYERS)) as room:
        remote = room.remote()
        remote.load_lora(directory)
        with torch.no_grad():
            close(remote(ids).logits, whole(ids).logits)
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        assert torch.equal(remote.generate(ids, **options), whole.generate(input_ids=ids, **options))


def test_an_adapter_trained_through_the_swarm_loads_in_peft(tmp_path: Path) -> None:
    model = tiny("llama")
    ids = random_tokens(4, 12)
    with Room(model.directory, ann=(0, 2), bob=(2, LAYERS)) as room:
        remote = room.remote()
        lora = remote.new_lora(rank=4, alpha=8)
        optimizer = torch.optim.AdamW(lora.parameters(), lr=0.01)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = remote(ids, labels=ids).loss
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
        lora.save(tmp_path, "tiny")
        with torch.no_grad():
            found = remote(ids).logits

    auto: Any = AutoModelForCausalLM
    theirs = PeftModel.from_pretrained(auto.from_pretrained(model.directory, dtype=torch.float32), tmp_path)
    with torch.no_grad():
        close(found, theirs(ids).logits)
    assert losses[-1] < losses[0]


async def test_chats_choose_an_adapter_that_peers_host(stored: tuple[Path, Model]) -> None:
    directory, whole = stored
    model, prompt = tiny("llama"), random_tokens(1, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    async with Swarm(model.directory) as swarm:
        await swarm.start_one("ann", "0:3", adapters=(str(directory),))
        await swarm.start_one("bob", f"3:{LAYERS}", adapters=(str(directory),))
        await swarm.start_one("eve", f"0:{LAYERS}")
        base = swarm.client.directory.find(model.directory.name)
        chosen = swarm.client.directory.find(f"{base.name}+pirate")
        texts = [prompt[0].tolist()] * 2
        requests = [
            Request(artefact=swarm.artefact, prompt=text, max_new_tokens=8, adapter=adapter)
            for text, adapter in zip(texts, (chosen.adapter, ""), strict=True)
        ]
        with_it, without = [
            tokens([event async for event in swarm.client.generate(request)]) for request in requests
        ]

    assert {peer.name for peer in chosen.peers} == {"ann", "bob"}
    assert with_it == whole.generate(input_ids=prompt, **options)[0, 6:].tolist()
    assert without == model.whole.generate(prompt, **options)[0, 6:].tolist()


def test_a_remote_model_uses_a_hosted_adapter(stored: tuple[Path, Model]) -> None:
    directory, whole = stored
    ids = random_tokens(2, 9)
    with Room(tiny("llama").directory, eve=(0, LAYERS)) as room:
        room.loop.run(room.swarm.start_one("ann", f"0:{LAYERS}", adapters=(str(directory),)))
        remote = room.remote()
        room.loop.run(room.swarm.until(lambda: bool(room.swarm.client.directory.adapted())))
        remote.host("pirate")
        with torch.no_grad():
            close(remote(ids).logits, whole(ids).logits)
        assert torch.equal(
            remote.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0),
            whole.generate(
                input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
        )


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadInputs, match="never a pickle"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"bias": "lora_only"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_lora_with_more_than_its_matrices_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    adapted(tiny("llama").whole, **options).save_pretrained(tmp_path)

    with pytest.raises(BadInputs, match=f"anew without {next(iter(options))}, or merge"):
        open_adapter(tmp_path)


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"r": 0, "lora_alpha": 1}'])
def test_a_malformed_config_is_refused(tmp_path: Path, stored: tuple[Path, Model], config: str) -> None:
    shutil.copytree(stored[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text(config)

    with pytest.raises(BadInputs, match="no config of a LoRA"):
        open_adapter(tmp_path)


def test_an_adapter_s_id_stands_for_its_numbers(stored: tuple[Path, Model]) -> None:
    one = open_adapter(stored[0])

    assert one.name == "pirate"
    assert one.id == open_adapter(stored[0]).id
    assert len(one.adapter.pairs) == 2 * LAYERS
