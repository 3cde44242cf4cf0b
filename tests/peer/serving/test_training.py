"""A peer computes forward and backward passes for whoever holds the ends, and keeps nothing it need not."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping

import msgspec
import pytest
import torch

from peer.wire_tensors import pack, unpack
from shared.client.calls import NotServed
from shared.client.swarm_client import SwarmClient
from shared.identity import Identity, PeerId
from shared.protocol import Backward, Forward, Lend
from tests.harness.swarm import Swarm
from tests.peer.model.families import LAYERS, Tiny, tiny

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny("llama")


async def ask(swarm: Swarm, name: str, tensors: Tensors, **fields: object) -> dict[str, torch.Tensor]:
    parts, body = pack(tensors)
    kind = Backward if "gradient" in tensors else Forward
    message = kind(
        **{"request": 0, "artefact": swarm.artefact, "start": 0, "end": LAYERS, "parts": parts} | fields  # type: ignore[arg-type]
    )
    outputs, answer = await swarm.client.calls.ask(swarm.peers[name].identity.id, message, body)
    return unpack(outputs.parts, answer)


def hidden(batch: int = 2, count: int = 10) -> torch.Tensor:
    return torch.randn(batch, count, 32, generator=torch.Generator().manual_seed(count))


async def test_a_pass_gives_what_the_layers_of_the_model_give(model: Tiny) -> None:
    states = hidden()
    async with Swarm(model.directory) as swarm:
        await swarm.start(ann=(0, LAYERS))

        found = await ask(swarm, "ann", {"hidden": states}, each=True)

    expected = model.whole.model(inputs_embeds=states, output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(found[f"hidden.{layer}"], expected[layer + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.whole.model.norm(found[f"hidden.{LAYERS - 1}"]), expected[-1])


async def test_gradients_in_pieces_are_those_of_one_pass(model: Tiny) -> None:
    states, gradient = hidden(8, 40), torch.randn(8, 40, 32)
    async with Swarm(model.directory) as swarm:
        await swarm.start(ann=(1, 5))
        found = await ask(swarm, "ann", {"hidden": states, "gradient": gradient}, start=1, end=5)

    arriving = states.clone().requires_grad_()
    output = model.spans[1].states(arriving, 1, 4)[-1]
    output = model.spans[2].states(output, 4, 5)[-1]
    (expected,) = torch.autograd.grad(output, arriving, gradient)
    torch.testing.assert_close(found["hidden"], expected, rtol=1e-5, atol=1e-6)


async def test_a_session_is_appended_to_taken_back_and_put_in_another_order(model: Tiny) -> None:
    states = hidden(2, 12)
    session = {"session": secrets.token_hex(16), "room": 32}
    async with Swarm(model.directory) as swarm:
        await swarm.start(ann=(0, LAYERS))
        whole = (await ask(swarm, "ann", {"hidden": states}))["hidden"]

        await ask(swarm, "ann", {"hidden": states[:, :7]}, **session)
        await ask(swarm, "ann", {"hidden": hidden(2, 3)}, **session, position=7)
        taken_back = await ask(swarm, "ann", {"hidden": states[:, 7:10]}, **session, position=7)
        order = torch.tensor([1, 0, 1], dtype=torch.int32)
        ordered = {"hidden": states[[1, 0, 1], 10:], "order": order}
        in_order = await ask(swarm, "ann", ordered, **session, position=10)
        reserved = swarm.reserved_bytes()["ann"]

    torch.testing.assert_close(taken_back["hidden"], whole[:, 7:10], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_order["hidden"], whole[[1, 0, 1], 10:], rtol=1e-5, atol=1e-5)
    assert reserved == 3 * 32 * LAYERS * 2 * 2 * 8 * 4


async def test_what_does_not_fit_is_refused_with_a_sentence(model: Tiny) -> None:
    wrong: dict[str, tuple[Tensors, dict[str, object]]] = {
        "artefact": ({"hidden": hidden()}, {"artefact": "0" * 64}),
        "layers": ({"hidden": hidden()}, {"end": LAYERS + 1}),
        "adapter": ({"hidden": hidden()}, {"adapter": "1" * 64}),
        "lost": ({"hidden": hidden()}, {"session": secrets.token_hex(16), "position": 3, "room": 9}),
        "invalid": ({"hidden": hidden()[:, :, :5]}, {}),
    }
    async with Swarm(model.directory) as swarm:
        await swarm.start(ann=(0, LAYERS))
        for code, (tensors, fields) in wrong.items():
            with pytest.raises(NotServed) as refused:
                await ask(swarm, "ann", tensors, **fields)
            assert refused.value.refusal.code == code
        with pytest.raises(NotServed, match="as many columns"):
            await ask(swarm, "ann", {"hidden": hidden(), "mask": torch.ones(2, 9, dtype=torch.int32)})
        with pytest.raises(NotServed, match="shape of the hidden states"):
            await ask(swarm, "ann", {"hidden": hidden(), "gradient": hidden(1)})

        await ask(swarm, "ann", {"hidden": hidden()})


async def test_a_lent_adapter_changes_its_asker_s_passes_alone(model: Tiny) -> None:
    path = "model.layers.2.self_attn.q_proj"
    matrices = {f"{path}.A": torch.randn(4, 32), f"{path}.B": torch.randn(32, 4)}
    states = hidden()
    parts, body = pack(matrices)
    async with Swarm(model.directory) as swarm:
        await swarm.start(ann=(0, LAYERS))
        ann = PeerId(swarm.peers["ann"].identity.id)
        plain = await ask(swarm, "ann", {"hidden": states})
        await swarm.client.calls.ask(ann, Lend(0, "1" * 64, parts), body)
        changed = await ask(swarm, "ann", {"hidden": states}, adapter="1" * 64)
        again = await ask(swarm, "ann", {"hidden": states})
        found = await ask(
            swarm, "ann", {"hidden": states, "gradient": hidden(2, 10)}, adapter="1" * 64, learns=True
        )
        with pytest.raises(NotServed, match="does not fit"):
            await swarm.client.calls.ask(ann, Lend(0, "2" * 64, *_renamed(parts, path)), body)

    assert not torch.allclose(plain["hidden"], changed["hidden"])
    assert torch.equal(plain["hidden"], again["hidden"])
    assert found.keys() == {"hidden", *matrices}


def _renamed(parts: list, path: str) -> list:  # type: ignore[type-arg]
    return [[type(part)(part.name.replace(path, "model.norm"), part.tensor) for part in parts]]


async def test_askers_take_turns_and_steps_of_sessions_go_first(model: Tiny) -> None:
    done: list[str] = []
    async with Swarm(model.directory) as swarm:
        await swarm.start(ann=(0, LAYERS))
        other = SwarmClient(Identity.generate(), swarm.relay_urls)
        async with other:
            await ask(swarm, "ann", {"hidden": hidden()})
            ann = PeerId(swarm.peers["ann"].identity.id)
            parts, body = pack({"hidden": hidden(8, 60)})
            message = Forward(request=0, artefact=swarm.artefact, start=0, end=LAYERS, parts=parts)
            await other.calls.ask(ann, message, body)  # by now both have a channel

            async def one(name: str, client: SwarmClient, **fields: object) -> None:
                await client.calls.ask(ann, msgspec.structs.replace(message, **fields), body)
                done.append(name)

            service = swarm.peers["ann"].service
            assert service is not None
            step = {"session": secrets.token_hex(16), "room": 60}
            with service.span.alone():  # nothing is computed until all of them wait
                asked = [asyncio.ensure_future(one("first", swarm.client)) for _ in range(4)]
                while service.training.waiting < 3:  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(0.01)
                asked.append(asyncio.ensure_future(one("other", other)))
                asked.append(asyncio.ensure_future(one("step", other, **step)))
                while service.training.waiting < 5:  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(0.01)
            await asyncio.gather(*asked)

    assert done == ["first", "step", "first", "other", "first", "first"]
