"""A pass goes on when peers are lost, with the very gradients that it would have had."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from tests.peer.model.families import LAYERS, random_tokens, tiny
from tests.peer.remote.room import Room, close

SPARES = {"ann": (0, 3), "bob": (3, LAYERS), "eve": (0, 3), "dan": (3, 4), "fay": (4, LAYERS)}


def gradients(remote: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: ANN401
    remote.zero_grad()
    torch.autograd.backward(remote(ids, labels=ids).loss)
    return {name: one.grad.clone() for name, one in remote.named_parameters() if one.grad is not None}


def tuned(room: Room) -> Any:  # noqa: ANN401
    remote = room.remote()
    torch.manual_seed(0)
    for up in remote.new_lora(rank=2).up:
        torch.nn.init.normal_(up, std=0.1)
    remote.new_deep_prompts(3).data.normal_(std=0.1)
    remote.layers.swarm.micro_batches = 6
    return remote


@pytest.mark.parametrize("passes", [1, 2, 4], ids=lambda passes: f"after-{passes}")
def test_a_peer_lost_in_the_middle_of_a_step(passes: int) -> None:
    """Of two peers with all later layers, one is lost: in the forward pass, or on the way back."""
    model = tiny("llama")
    ids = random_tokens(6, 8)
    with Room(model.directory, ann=(0, 3), bob=(3, LAYERS)) as room:
        remote = tuned(room)
        expected = gradients(remote, ids)
        room.start(**{name: span for name, span in SPARES.items() if name not in room.swarm.peers})
        computed = room.passes()
        stops_after(room, "bob", computed["bob"] + passes)

        found = gradients(remote, ids)

        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            close(gradient, expected[name])
        assert "bob" not in room.swarm.peers
        assert remote.layers.swarm.chain.rerouted > 0


def stops_after(room: Room, name: str, passes: int) -> None:
    """The peer goes away once it has computed so many passes."""

    async def go() -> None:
        room.loop.start(room.swarm.stop(name))
        await asyncio.Event().wait()  # nothing more comes from it

    room.when(name, passes, go)


def test_a_text_goes_on_when_a_peer_of_its_session_is_lost() -> None:
    model = tiny("llama")
    ids = random_tokens(2, 6)
    options = {
        "do_sample": False,
        "num_beams": 3,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": 10,
    }
    expected = model.whole.generate(ids, **options)
    with Room(model.directory, ann=(0, 3), bob=(3, LAYERS)) as room:
        remote = room.remote()
        room.start(eve=(0, 3), dan=(3, 4), fay=(4, LAYERS))
        assert remote.generate(ids, max_new_tokens=1).shape == (2, 7)
        used = {name for name, passes in room.passes().items() if passes}
        for name in used & {"ann", "bob"}:
            stops_after(room, name, 4)

        found = remote.generate(ids, **options)

        assert torch.equal(found, expected)
        assert remote.layers.swarm.chain.rerouted > 0


def test_micro_batches_spread_over_replicas() -> None:
    model = tiny("llama")
    with Room(model.directory, ann=(0, 3), eve=(0, 3), bob=(3, LAYERS)) as room:
        remote = room.remote()
        remote.layers.swarm.micro_batches = 4
        with torch.no_grad():
            remote(random_tokens(8, 20))

        passes = room.passes()

    assert passes["ann"] + passes["eve"] == passes["bob"] == 4
    assert passes["ann"] > 0
    assert passes["eve"] > 0
