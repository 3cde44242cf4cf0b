"""A model whose layers live in a swarm computes and generates what the unsplit model does."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, TextStreamer
from transformers.cache_utils import DynamicCache

from peer.model.anatomy import find_layers
from peer.model.errors import BadInputs
from peer.remote import RemoteModel
from shared.errors import NoRoute
from tests.peer.model.families import LAYERS, Tiny, random_tokens, tiny
from tests.peer.remote.room import Room, close, padded

Model = Any
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
THREE = {"ann": (0, 2), "bob": (2, 3), "eve": (3, LAYERS)}


@pytest.fixture(scope="module", params=["llama", "gemma3", "bloom"])
def model(request: pytest.FixtureRequest) -> Tiny:
    return tiny(request.param)


@pytest.fixture(scope="module")
def room(model: Tiny) -> Iterator[Room]:
    with Room(model.directory, **THREE) as room:
        yield room


@pytest.fixture(scope="module")
def remote(room: Room) -> Model:
    return room.remote()


def test_logits_and_hidden_states(model: Tiny, remote: Model) -> None:
    ids = random_tokens(2, 20)

    with torch.no_grad():
        found = remote(ids, output_hidden_states=True)
        expected = model.whole(ids, output_hidden_states=True)

    close(found.logits, expected.logits)
    assert len(found.hidden_states) == LAYERS + 1
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(mine, theirs)


def test_step_by_step_as_in_one_pass(model: Tiny, remote: Model) -> None:
    ids = random_tokens(1, 20)
    expected = model.expected(ids)

    with torch.no_grad(), remote.session(20) as session:
        pieces = [
            remote(ids[:, start:end], past_key_values=session).logits
            for start, end in ((0, 9), (9, 14), *((place, place + 1) for place in range(14, 20)))
        ]
        assert session.position == 20
        with pytest.raises(ValueError, match="more than the 20"):
            remote(ids[:, :1], past_key_values=session)

    close(torch.cat(pieces, 1), expected)


def test_a_position_set_back_leaves_no_trace(model: Tiny, remote: Model) -> None:
    ids, others = random_tokens(1, 78), random_tokens(1, 20)

    with torch.no_grad(), remote.session(100) as session:
        remote(ids, past_key_values=session)
        session.position = 2
        found = remote(others, past_key_values=session).logits

    close(found, model.expected(torch.cat([ids[:, :2], others], 1))[:, 2:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 5},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
@pytest.mark.parametrize("blank", [(0,), (0, 4)], ids=["one", "padded"])
def test_generate_draws_the_same_tokens(
    model: Tiny, remote: Model, options: dict[str, Any], blank: tuple[int, ...]
) -> None:
    ids = random_tokens(len(blank), 10)
    inputs = {"input_ids": ids, "attention_mask": padded(len(blank), 10, blank), "max_new_tokens": 8}

    torch.manual_seed(3)
    found = remote.generate(**inputs, **GREEDY | options)
    torch.manual_seed(3)
    expected = model.whole.generate(**inputs, **GREEDY | options)

    assert torch.equal(found, expected)


def test_generate_goes_on_in_one_session(model: Tiny, remote: Model) -> None:
    ids = random_tokens(1, 6)
    expected = model.whole.generate(ids, max_new_tokens=9, **GREEDY)

    with remote.session(20) as session:
        for new in (1, 7, 1):
            ids = remote.generate(ids, max_new_tokens=new, past_key_values=session, **GREEDY)

    assert torch.equal(ids, expected)


def test_generate_with_a_noisy_draft_of_another_model(model: Tiny, remote: Model) -> None:
    ids = random_tokens(1, 6)
    draft = type(model.whole)(model.whole.config).eval()
    draft.load_state_dict(model.whole.state_dict())
    for weight in draft.parameters():
        weight.data += torch.randn_like(weight) * 0.02
    draft.generation_config.eos_token_id = None
    expected = model.whole.generate(ids, max_new_tokens=24, **GREEDY)

    found = remote.generate(ids, max_new_tokens=24, assistant_model=draft, **GREEDY)

    assert torch.equal(found, expected)


def test_generate_streams(remote: Model) -> None:
    class Heard(TextStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None: ...

    heard = Heard()
    found = remote.generate(random_tokens(1, 6), max_new_tokens=5, streamer=heard, **GREEDY)

    assert heard.tokens == found[0].tolist()


def test_a_slice_is_the_layers_of_the_model(model: Tiny, remote: Model) -> None:
    states = torch.randn(1, 136, 32)
    one, chain = remote.layers[4], remote.layers[1:4]

    close(one(states), model.spans[2].differentiable(states, 4, 5))
    halves = remote.layers[3:](remote.layers[:3](states))
    close(remote.layers(states), halves)
    assert (len(remote.layers), len(chain), [len(each) for each in chain]) == (LAYERS, 3, [1, 1, 1])
    assert repr(chain) == "RemoteLayers(\n  1:4\n  (between): ModuleDict()\n)"
    mine, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    torch.autograd.backward(chain(mine).square().sum())
    torch.autograd.backward(model.spans[1].differentiable(theirs, 1, 4).square().sum())
    close(mine.grad, theirs.grad)


def test_a_slice_has_sessions_of_its_own(model: Tiny, remote: Model) -> None:
    states = torch.randn(1, 12, 32)

    with remote.layers[1:4].session(12) as session:
        pieces = [
            session.step(states[:, :4])[0],
            *(session.step(states[:, at : at + 1])[0] for at in range(4, 12)),
        ]
        assert session.step(states[:, :0])[0].shape == (1, 0, 32)

    close(torch.cat(pieces, 1), model.spans[1].differentiable(states, 1, 4))


def test_modules_between_layers_learn(model: Tiny, remote: Model) -> None:
    ids = random_tokens(2, 8)
    between = torch.nn.Linear(32, 32)
    remote.layers.insert(3, between)
    try:
        torch.autograd.backward(remote(ids, labels=ids).loss)
        found = between.weight.grad
        between.weight.grad = None
        with torch.no_grad():
            stepped = remote.generate(ids, max_new_tokens=4, **GREEDY)
            logits = remote(stepped[:, :-1]).logits
    finally:
        del remote.layers.between["3"]

    hook = find_layers(model.whole)[3].register_forward_pre_hook(_through(between), with_kwargs=True)
    torch.autograd.backward(model.whole(ids, labels=ids).loss)
    hook.remove()
    close(found, between.weight.grad)
    assert torch.equal(logits[:, 7:].argmax(-1), stepped[:, 8:])


def _through(module: torch.nn.Module) -> Any:  # noqa: ANN401
    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        if args:
            return (module(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": module(kwargs["hidden_states"])}

    return hook


def test_half_precision_on_the_wire_changes_little(remote: Model) -> None:
    states = torch.randn(2, 16, 32)
    chain = remote.layers.swarm.chain
    exact, rounded = states.clone().requires_grad_(), states.clone().requires_grad_()
    one = remote.layers(exact)
    torch.autograd.backward(one.sum())
    chain.wire = torch.float16
    try:
        other = remote.layers(rounded)
        torch.autograd.backward(other.sum())
    finally:
        chain.wire = torch.float32

    assert 0 < float((one - other).abs().mean()) < 0.01
    assert float((exact.grad - rounded.grad).norm() / exact.grad.norm()) < 0.05  # type: ignore[union-attr, operator]


def test_a_session_takes_the_room_it_asked_for_and_gives_it_back(room: Room, remote: Model) -> None:
    per_token = {name: room.bytes_per_token(name) for name in THREE}
    before = room.swarm.reserved_bytes()
    session = remote.session(40)
    with torch.no_grad():
        remote(random_tokens(2, 5), past_key_values=session)

    taken = {name: held - before[name] for name, held in room.swarm.reserved_bytes().items()}
    assert taken == {name: 40 * 2 * size for name, size in per_token.items()}
    for _, part in session._parts:
        remote.layers.swarm.loop.run(part.close())
    with torch.no_grad():
        remote(random_tokens(1, 5))  # by the same channels, so what was told before has arrived
    assert room.swarm.reserved_bytes() == before


def test_a_classifier_is_that_of_transformers(model: Tiny, room: Room) -> None:
    remote = room.remote(task="classification", labels=3)
    auto: Any = AutoModelForSequenceClassification
    whole = auto.from_pretrained(model.directory, num_labels=3, dtype=torch.float32).eval()
    whole.score.load_state_dict(remote.score.state_dict())
    whole.config.pad_token_id = remote.config.pad_token_id = 0
    ids, labels = random_tokens(4, 9), torch.tensor([0, 2, 1, 2])

    found, expected = remote(ids, labels=labels), whole(ids, labels=labels)
    torch.autograd.backward(found.loss)
    torch.autograd.backward(expected.loss)

    close(found.logits, expected.logits)
    close(remote.score.weight.grad, whole.score.weight.grad)


def test_what_cannot_be_is_said_in_a_sentence(room: Room, remote: Model) -> None:
    with pytest.raises(TypeError, match="come from its `session`"):
        remote(random_tokens(1, 3), past_key_values=DynamicCache())
    with pytest.raises(BadInputs, match="no matrix of the model is named nothing"):
        remote.new_lora(targets=["nothing"])
    with pytest.raises(NoRoute, match="no live peer hosts an adapter"):
        remote.host("pirate")
    with pytest.raises(BadInputs, match="other weights by the name"):
        _renamed(room)


def _renamed(room: Room) -> None:
    with tempfile.TemporaryDirectory() as directory:
        other = Path(directory, room.model.name)
        shutil.copytree(room.model, other)
        tensors = load_file(other / "model.safetensors")
        save_file({name: tensor * 2 for name, tensor in tensors.items()}, other / "model.safetensors")
        RemoteModel.from_swarm(str(other), relays=room.swarm.relay_urls)


def test_leaving_ends_the_thread(room: Room) -> None:
    before = swarm_threads()
    RemoteModel.from_swarm(str(room.model), relays=room.swarm.relay_urls).close()

    assert swarm_threads() == before


def swarm_threads() -> int:
    """Loops of remote models that run; other threads of this process come and go as they like."""
    return sum(thread.name == "swarm" for thread in threading.enumerate())
