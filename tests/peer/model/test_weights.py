"""Packed weights multiply as dense ones do, within their rounding, wherever a family's code meets them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peer.model.bits_and_bytes import LlmInt8, Nf4
from peer.model.quantization import pack_matrices
from peer.model.quantized_cache import QuantizedCache
from peer.model.span import Span
from peer.model.weights import PackedWeight, Rows, Weights
from tests.peer.model.families import CUTS, Tiny, every_family, random_tokens, tiny
from tests.peer.model.quantizations import ERROR, FAST, quantization

conv1d: Any = Conv1D

TOLERANCE = {"fp16": 4e-4, "int8": 0.01, "int8-fast": 0.012, "int4": 0.12, "nf4": 0.12, "llm-int8": 0.02}
"""Relative error of a product with random numbers."""


def pack(name: str, weight: torch.Tensor) -> Weights:
    if name == "nf4":
        return Nf4(weight)
    return LlmInt8(weight) if name == "llm-int8" else quantization(name).layers.pack(weight)


def packed(name: str, weight: torch.Tensor, *, flipped: bool = False) -> PackedWeight:
    matrices = pack_matrices(quantization(name).layers, weight, flipped=flipped)
    return PackedWeight.of(matrices, weight.shape, weight, flipped=flipped)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 64), (96, 192), (33, 256)])
def test_a_product_is_right_within_its_rounding(name: str, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    weights = pack(name, weight)

    for shape in ((1, 1), (2, 3), (1, 40)):
        x = torch.randn(*shape, inputs)
        product = weights.forward(x)
        assert product.shape == (*shape, outputs)
        assert error(product, x @ weight.T) < TOLERANCE[name]
        assert error(product, x @ weights.dense().T) < min(0.012, 20 * TOLERANCE[name])
    assert error(weights.dense(), weight) < TOLERANCE[name]
    if name != "fp16":
        assert weights.nbytes < 4.4 * outputs * inputs


@pytest.mark.parametrize("name", ["fp16", "int8", "int8-fast", "int4"])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 24), (17, 33), (100, 70)])
def test_any_shape_can_be_packed(name: str, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weights = pack(name, torch.randn(outputs, inputs))
    x = torch.randn(5, inputs)

    assert error(weights.forward(x), x @ weights.dense().T) < 0.02


@pytest.mark.parametrize(("name", "rows"), [("fp16", 67), ("int8", 32), ("int8-fast", 67), ("int4", 67)])
def test_a_row_gives_the_same_bits_alone_and_among_others(name: str, rows: int) -> None:
    torch.manual_seed(0)
    weights, x = pack(name, torch.randn(160, 96)), torch.randn(rows, 96)

    together = weights.forward(x)

    assert torch.equal(torch.cat([weights.forward(row[None]) for row in x]), together)
    assert torch.equal(weights.forward(x[3:8]), together[3:8])


def test_of_many_rows_of_eight_bit_weights_some_numbers_round_to_their_neighbour() -> None:
    """As many are many; without the kernel's own roundings a row would move by 2e-3 of its length."""
    torch.manual_seed(0)
    weights, x = pack("int8", torch.randn(600, 512)), torch.randn(80, 512)
    alone, together = torch.cat([weights.forward(row[None]) for row in x]), weights.forward(x)

    assert float((alone != together).float().mean()) < 0.002
    assert float(((alone - together).norm(dim=1) / alone.norm(dim=1)).max()) < 5e-4


def test_eight_bit_weights_are_not_harmed_by_outliers() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(128, 256), torch.randn(4, 256)
    x[:, [3, 70]] *= 30

    for name in ("int8", "int8-fast"):
        assert error(pack(name, weight).forward(x), x @ weight.T) < 0.015


def test_zeros_stay_zeros_and_large_numbers_finite() -> None:
    for name in FAST:
        assert pack(name, torch.zeros(32, 64)).forward(torch.randn(2, 64)).abs().max() == 0
        assert pack(name, torch.randn(32, 64)).forward(torch.zeros(2, 64)).abs().max() == 0
        assert torch.isfinite(pack(name, torch.full((32, 64), 1e5)).forward(torch.ones(1, 64))).all()


# ---------------------------------------------------------------- in a family's code


def test_linear_conv1d_and_experts_do_not_know_that_their_weights_are_packed() -> None:
    torch.manual_seed(0)
    x, experts = torch.randn(2, 3, 32), torch.randn(4, 48, 32)
    linear: Any = nn.Linear(32, 48)
    conv = conv1d(48, 32)
    expected = linear(x).detach(), conv(x).detach()

    linear.weight = packed("fp16", linear.weight.detach())
    conv.weight = packed("fp16", conv.weight.detach(), flipped=True)
    several = packed("fp16", experts)
    turned = packed("fp16", experts.transpose(1, 2).contiguous(), flipped=True)

    assert error(linear(x), expected[0]) < 4e-4
    assert error(conv(x), expected[1]) < 4e-4
    assert error(x @ linear.weight.T, x @ linear.weight.dense().T) < 4e-4
    for expert in (2, torch.tensor(2)):
        assert error(nn.functional.linear(x, several[expert]), x @ experts[2].T) < 4e-4
        assert error(x @ turned[expert], x @ experts[2].T) < 4e-4
    rows = torch.randn(4, 5, 32)
    assert error(torch.bmm(rows, turned), rows @ experts.transpose(1, 2)) < 4e-4


def test_an_embedding_is_looked_up_in_half_the_memory() -> None:
    table, ids = torch.randn(50, 32), torch.tensor([[3, 49], [0, 3]])
    embedding: Any = nn.Embedding(50, 32, padding_idx=0)
    embedding.weight = PackedWeight.of([Rows(table)], table.shape, table)

    found = embedding(ids)

    assert (found.shape, found.dtype) == ((2, 2, 32), torch.float32)
    torch.testing.assert_close(found, table[ids], rtol=1e-3, atol=1e-6)
    assert embedding.weight.nbytes == table.nbytes / 2
    assert torch.equal(Rows(table * 1e6).look_up(ids), table[ids] * 1e6)


def test_operations_that_are_not_known_get_the_dense_numbers() -> None:
    weight = torch.randn(4, 48, 32)
    stand_in = packed("fp16", weight)

    for operation in (torch.abs, torch.sum, lambda tensor: tensor[1:3], lambda tensor: tensor[:, 3] + 1):
        torch.testing.assert_close(operation(stand_in), operation(weight), rtol=1e-3, atol=1e-3)


def test_a_packed_weight_tells_of_itself_as_a_parameter_does() -> None:
    stand_in = packed("int8", torch.randn(48, 32))
    linear: Any = nn.Linear(32, 48)
    linear.weight = stand_in

    assert isinstance(stand_in, nn.Parameter)
    assert (stand_in.shape, stand_in.dtype, stand_in.device.type) == ((48, 32), torch.float32, "cpu")
    assert linear.state_dict()["weight"].shape == (48, 32)
    assert stand_in.nbytes == 48 * 32 + 48 * 2
    assert repr(stand_in) == "PackedWeight([48, 32], Int8)"


@pytest.mark.parametrize("name", FAST)
def test_a_gradient_passes_through_packed_weights(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    linear: Any = nn.Linear(64, 48, bias=False)
    linear.weight = packed(name, weight)
    x = torch.randn(3, 64, requires_grad=True)

    linear(x).square().sum().backward()

    assert x.grad is not None
    dense = linear.weight.dense()
    assert error(x.grad, 2 * (x @ dense.T).detach() @ dense) < 0.02


# ---------------------------------------------------------------- whole families


@pytest.fixture(params=every_family())
def model(request: pytest.FixtureRequest) -> Tiny:
    torch.manual_seed(1)
    return tiny(request.param)


def logits(model: Tiny, name: str, cache: QuantizedCache | None, tokens: torch.Tensor) -> torch.Tensor:
    """Of three spans, each loaded anew."""
    states = tokens
    for start, end in itertools.pairwise(CUTS):
        span = Span.load(model.checkpoint, start, end, quantization=quantization(name), quantized=cache)
        states = span.forward(states, span.new_cache(start, end, 64), 0, all_logits=True)
    return states


@pytest.mark.parametrize("name", FAST)
def test_a_family_computes_with_packed_weights(model: Tiny, name: str, tmp_path: Path) -> None:
    tokens = random_tokens(1, 20)
    cache = QuantizedCache(tmp_path)

    once = logits(model, name, cache, tokens)
    again = logits(model, name, cache, tokens)

    assert 0 < error(once, model.expected(tokens)) < ERROR[name]
    assert torch.equal(once, again)


@pytest.mark.parametrize("name", ["nf4", "llm-int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_family_computes_with_the_weights_of_gpus(family: str, name: str) -> None:
    torch.manual_seed(1)
    model, tokens = tiny(family), random_tokens(1, 20)

    assert 0 < error(logits(model, name, None, tokens), model.expected(tokens)) < ERROR[name]


@pytest.mark.parametrize("name", FAST)
def test_greedy_tokens_differ_only_where_two_are_nearly_alike(name: str) -> None:
    """The first token that differs is among those whose logits the rounding can exchange."""
    torch.manual_seed(1)
    model = tiny("llama")
    span = Span.load(model.checkpoint, 0, 6, quantization=quantization(name))
    for _ in range(5):
        tokens = random_tokens(1, 12)
        rounded = span.forward(tokens, span.new_cache(0, 6, 12), 0, all_logits=True)[0]
        expected = model.expected(tokens)[0]
        lost = expected.max(1).values - expected.gather(1, rounded.argmax(1, keepdim=True))[:, 0]
        # Two logits can only change places when they are closer than the rounding moves both of them.
        assert bool((lost <= 2 * (rounded - expected).abs().max(1).values).all())
        assert float(lost.max()) <= 4 * ERROR[name] * float(expected.std())
