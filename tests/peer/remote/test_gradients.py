"""Gradients through one, two and three peers are those of the unsplit model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.peer.model.families import LAYERS, Tiny, random_tokens, tiny
from tests.peer.remote.room import Room, close, padded, with_deep_prompts

FAMILIES = ["llama", "qwen3", "falcon-7b", "bloom", "mixtral", "gemma3"]
PLACES = {
    1: {"ann": (0, LAYERS)},
    2: {"ann": (0, 4), "bob": (4, LAYERS)},
    3: {"ann": (0, 1), "bob": (1, 4), "eve": (4, LAYERS)},
}


@pytest.fixture(
    scope="module",
    params=[
        *((family, peers) for family in FAMILIES for peers in PLACES),
        ("falcon-alibi", 3),
        ("gpt2", 3),
    ],
    ids=lambda chosen: f"{chosen[0]}-{chosen[1]}",
)
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Tiny, Any]]:
    family, peers = request.param
    model = tiny(family)
    with Room(model.directory, **PLACES[peers]) as room:
        yield model, room.remote()


@pytest.fixture
def remote(place: tuple[Tiny, Any]) -> Iterator[Any]:
    remote = place[1]
    yield remote
    remote.lora = remote.prompt = remote.deep_prompts = None


def loss_of(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:  # noqa: ANN401
    loss: torch.Tensor = model(labels=ids, **inputs).loss
    return loss


def test_of_the_inputs(place: tuple[Tiny, Any], remote: Any) -> None:  # noqa: ANN401
    whole = place[0].whole
    ids = random_tokens(4, 9)
    embeds = whole.get_input_embeddings()(ids).detach()
    mine, theirs = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    mask = padded(4, 9, (0, 3, 0, 1))

    found = loss_of(remote, ids, inputs_embeds=mine, attention_mask=mask)
    expected = loss_of(whole, ids, inputs_embeds=theirs, attention_mask=mask)
    torch.autograd.backward(found)
    torch.autograd.backward(expected)

    close(found, expected)
    close(mine.grad, theirs.grad)


def test_of_deep_prompts(place: tuple[Tiny, Any], remote: Any) -> None:  # noqa: ANN401
    ids = random_tokens(3, 9)
    prompts = torch.randn(LAYERS, 4, 32) * 0.1
    remote.new_deep_prompts(4).data.copy_(prompts)
    theirs = prompts.clone().requires_grad_()

    found = loss_of(remote, ids, input_ids=ids)
    expected = loss_of(with_deep_prompts(place[0].whole, theirs), ids, input_ids=ids)
    torch.autograd.backward(found)
    torch.autograd.backward(expected)

    close(found, expected)
    close(remote.deep_prompts.grad, theirs.grad)


def test_of_lora_as_peft_has_it(place: tuple[Tiny, Any], remote: Any, tmp_path: Path) -> None:  # noqa: ANN401
    ids = random_tokens(3, 9)
    lora = remote.new_lora(rank=3, alpha=5.0)
    for up in lora.up:
        torch.nn.init.normal_(up, std=0.1)
    lora.save(tmp_path, "tiny")
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(place[0].whole), tmp_path, is_trainable=True)

    found = loss_of(remote, ids, input_ids=ids)
    expected = loss_of(theirs, ids, input_ids=ids)
    torch.autograd.backward(found)
    torch.autograd.backward(expected)

    close(found, expected)
    gradients = {name: matrix.grad for name, matrix in theirs.named_parameters() if matrix.grad is not None}
    for path, down, up in zip(lora.paths, lora.down, lora.up, strict=True):
        close(down.grad, gradients.pop(f"base_model.model.{path}.lora_A.default.weight"))
        close(up.grad, gradients.pop(f"base_model.model.{path}.lora_B.default.weight"))
    assert not gradients


def test_of_a_prompt_before_the_text(place: tuple[Tiny, Any], remote: Any) -> None:  # noqa: ANN401
    whole = place[0].whole
    ids = random_tokens(3, 7)
    prompt = remote.new_prompt(5)
    theirs = prompt.detach().clone().requires_grad_()
    embeds = torch.cat([theirs.expand(3, -1, -1), whole.get_input_embeddings()(ids)], 1)

    found = loss_of(remote, ids, input_ids=ids)
    expected = loss_of(whole, torch.cat([torch.full((3, 5), -100), ids], 1), inputs_embeds=embeds)
    torch.autograd.backward(found)
    torch.autograd.backward(expected)

    close(found, expected)
    close(prompt.grad, theirs.grad)
