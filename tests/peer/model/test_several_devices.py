"""A span whose layers lie on several devices: whatever is computed with one another lies together.

GPUs are played by torch's fake tensors, which have devices, shapes and no numbers, and refuse to compute with
tensors of two devices as a GPU does. That the numbers are right is tested on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peer.model import family as families
from peer.model.errors import UnsupportedModel
from peer.model.extras import Adapter, Extras
from peer.model.kv_cache import KVCache
from peer.model.span import Span
from peer.model.steps import CHECKS
from tests.peer.model.families import CAPACITY, LAYERS, Tiny, every_family, random_tokens, tiny
from tests.peer.model.test_joint import ONE_BY_ONE
from tests.peer.model.test_steps import GATHERED, check_against_the_whole

FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)
"""Of all kinds with numbers, the one that torch's build for CPUs can play."""
PLACES = dict(enumerate([FIRST, FIRST, SECOND, SECOND, SECOND, FIRST]))
"""Layers on two GPUs, back on the first one in the end."""
CPU = torch.device("cpu")
NOT_PLAYED = {"falcon-7b", "falcon-40b", "gpt-neo", "nemotron"}
"""Their code brings a list of places to the device or sets autocast, of which the play knows nothing."""


@contextmanager
def on_two_gpus(span: Span) -> Iterator[Span]:
    """The same span as if it had been loaded onto two GPUs."""
    mode = FakeTensorMode()
    if families.fused_experts(span._model):
        # The other ways to choose experts look at numbers, or at how they are aligned.
        span._model.set_experts_implementation("batched_mm")
    span._spread = True
    span.device, span.layer_devices = FIRST, {layer: PLACES[layer] for layer in span.layer_devices}
    span._apart = {path: PLACES[layer] for layer, path in zip(span.layer_devices, span._apart, strict=True)}
    for path, part in span._model.named_modules():
        device = span._device_of(f"{path}.")

        def fake(tensor: torch.Tensor, device: torch.device = device) -> torch.Tensor:
            with mode:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(fake(weight), requires_grad=False)
        for held in (part._buffers, vars(part)):
            for name, tensor in list(held.items()):
                if isinstance(tensor, torch.Tensor):
                    held[name] = fake(tensor)
    with mode:
        yield span


def kept_on(cache: KVCache) -> list[torch.device]:
    """Where the keys of each layer lie."""
    return [kept.keys.read(0, 1).device for kept in cache._kept.values()]


@pytest.mark.parametrize("family", every_family(but=NOT_PLAYED))
def test_every_family_computes_each_layer_where_it_lies(family: str) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        on_two_gpus(Span.load(tiny(family).checkpoint, 0, LAYERS)) as span,
        torch.inference_mode(),
    ):
        whole, later = span.new_cache(0, LAYERS, CAPACITY), span.new_cache(1, 4, CAPACITY)
        ids = torch.zeros(1, 5, dtype=torch.int64, device=FIRST)
        states = torch.zeros(1, 5, span.hidden_size, device=FIRST)

        assert span._alone(ids, whole, slice(-1, None)).device == FIRST
        assert span.forward(states, later, 0).device == FIRST
        # Past the pass that is recorded; what would be compared has no numbers here.
        span._steps._same = lambda *_: True
        patch.setattr(torch, "equal", lambda *_: False)
        for _ in range(2 + CHECKS + 1):
            (one,) = span.forward_rows([span.row(states[:, :1], later, later.length)])
            assert one is not None and one.device == FIRST
        assert span.recorded_steps == (family not in ONE_BY_ONE | GATHERED)

        assert kept_on(whole) == list(PLACES.values())
        assert kept_on(later) == [PLACES[layer] for layer in range(1, 4)]


def test_sessions_together_and_passes_for_others_cross_devices_too() -> None:
    with on_two_gpus(Span.load(tiny("llama").checkpoint, 0, LAYERS)) as span:
        states = torch.zeros(1, 7, span.hidden_size, device=FIRST)
        caches = [span.new_cache(1, LAYERS, CAPACITY) for _ in range(2)]
        with torch.inference_mode():
            rows = [
                span.row(states[:, :count], cache, 0) for cache, count in zip(caches, (7, 2), strict=True)
            ]
            assert {output.device for output in span.forward_rows(rows) if output is not None} == {FIRST}

        path = "model.layers.3.mlp.up_proj"
        outputs, inputs = span._model.get_parameter(f"{path}.weight").shape
        adapter = span.prepare(Adapter({path: (torch.zeros(2, inputs), torch.zeros(outputs, 2))}))
        assert {matrix.device for matrix in adapter.pairs[path]} == {SECOND}
        extras = Extras(prompts={2: torch.zeros(3, span.hidden_size, device=FIRST)}, adapter=adapter)
        arriving = states.clone().requires_grad_()
        behind = span.states(arriving, 1, LAYERS, extras)
        assert {each.device for each in behind} == {FIRST}
        (gradient,) = torch.autograd.grad(behind[-1].sum(), arriving)
        assert gradient.device == FIRST


def test_weights_are_read_onto_the_device_of_their_layer() -> None:
    model = families.skeleton(tiny("mixtral").checkpoint.config, torch.float32)
    checkpoint = tiny("mixtral").checkpoint
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensor_names}
    families.make_buffers(model, model.modules(), CPU)
    with pytest.raises(UnsupportedModel, match="lacks"):  # meta tensors are taken for such that lack
        families.fill(model, tensors, torch.float32, CPU, apart={"model.layers.2": torch.device("meta")})

    there = {name for name, weight in model.named_parameters() if weight.is_meta}
    assert there == {name for name, _ in model.named_parameters() if name.startswith("model.layers.2.")}


def test_layers_that_are_told_apart_compute_the_same_numbers() -> None:
    """With one device under two names, of which a pass takes every way that it takes with two."""
    model: Tiny = tiny("gemma3")
    other = torch.device("cpu", 0)
    span = Span.load(model.checkpoint, 0, LAYERS, layer_devices=dict.fromkeys(range(2, 5), other))
    assert set(span.layer_devices.values()) == {CPU, other}
    tokens = random_tokens(1, 20)

    logits = span.forward(tokens, span.new_cache(0, LAYERS, CAPACITY), 0, all_logits=True)

    torch.testing.assert_close(logits, model.expected(tokens), rtol=1e-5, atol=1e-5)
    check_against_the_whole(model, [span], [5, 3], 2 + CHECKS + 2)
    assert span.recorded_steps == 1
