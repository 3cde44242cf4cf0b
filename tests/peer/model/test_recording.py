"""What a function told torch to do is done again for other inputs, or refused where that would be wrong."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from peer.model.recording import Recording, Unrecordable, aside, record

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def recorded(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Recording | Unrecordable:
    result, found = record(function, inputs, [WEIGHT])
    torch.testing.assert_close(result, function(*inputs), rtol=0, atol=0)
    return found


def step(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A little of everything that layers do."""
    halves = functional.linear(x, WEIGHT).chunk(2, dim=-1)
    turned = torch.cat((-halves[1], halves[0]), dim=-1).float().contiguous()
    turned *= positions[:, None].float().cos()
    turned[:, 1:3] = turned[:, 1:3] * 2
    top, _ = torch.topk(turned.softmax(-1), k=2)
    grid = torch.arange(turned.shape[1], device=x.device)
    with torch.no_grad():
        masked = turned.masked_fill(grid == 3, 0.5)
        masked += functional.one_hot(positions % 4, num_classes=4)
    return functional.silu(masked.mT.reshape(-1, 4), inplace=False).mul_(top.sum())


def test_other_inputs_give_what_the_function_itself_gives() -> None:
    found = recorded(step, torch.randn(2, 4), torch.tensor([0, 1]))

    assert isinstance(found, Recording)
    for seed in range(3):
        torch.manual_seed(seed)
        x, positions = torch.randn(2, 4), torch.randint(9, (2,))
        assert torch.equal(found.run(x.clone(), positions), step(x.clone(), positions))


def by_a_bool(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def by_an_item(x: torch.Tensor) -> torch.Tensor:
    return x * x.max().item()


def by_a_mask(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0].sum() * x


def by_nonzero(x: torch.Tensor) -> torch.Tensor:
    return x * x.nonzero().shape[0]


def by_where(x: torch.Tensor) -> torch.Tensor:
    return x * len(torch.where(x > 0)[0])


def by_repeats(x: torch.Tensor) -> torch.Tensor:
    return x * x.repeat_interleave(x.abs().long() + 1).shape[0]


def by_a_length(x: Any) -> Any:  # noqa: ANN401 - against what torch's stubs allow
    return x * torch.arange(2, x[0] + 3, device=x.device).shape[0]


def by_a_slice(x: Any) -> Any:  # noqa: ANN401 - against what torch's stubs allow
    return x * x[: x.argmax()].shape[0]


def by_new_zeros(x: Any) -> Any:  # noqa: ANN401 - against what torch's stubs allow
    return x * x.new_zeros(x.argmax()).shape[0]


def by_an_operator(x: Any) -> Any:  # noqa: ANN401 - against what torch's stubs allow
    return x * torch.ops.aten.nonzero.default(x).shape[0]


def by_one_hot(x: torch.Tensor) -> torch.Tensor:
    return x * functional.one_hot(x.abs().long()).shape[1]


def by_a_list(x: torch.Tensor) -> torch.Tensor:
    return x * float(sum(x.tolist()))


@pytest.mark.parametrize(
    "function",
    [
        by_a_bool,
        by_an_item,
        by_a_mask,
        by_nonzero,
        by_where,
        by_repeats,
        by_a_length,
        by_a_slice,
        by_new_zeros,
        by_an_operator,
        by_one_hot,
        by_a_list,
    ],
    ids=lambda function: function.__name__,
)
def test_what_looks_at_its_numbers_is_not_recorded(function: Callable[..., torch.Tensor]) -> None:
    found = recorded(function, torch.tensor([1.5, -2.0, 3.0]))

    assert isinstance(found, Unrecordable)


def test_numbers_that_come_from_elsewhere_are_not_taken_for_constants() -> None:
    outside = torch.ones(3)

    def unseen(x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return x + 1

    for function in (lambda x: x + outside, lambda x: unseen(x) * 2, unseen):
        found = recorded(function, torch.zeros(3))
        assert isinstance(found, Unrecordable) and "could not be seen" in str(found)


def test_what_is_done_aside_is_done_anew_each_time() -> None:
    calls: list[float] = []

    def look(x: torch.Tensor, extras: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(float(x.sum()))  # looks at numbers, which is its own affair
        return x + len(calls) + extras["bias"]

    def function(x: torch.Tensor) -> torch.Tensor:
        return aside(look, x * 2, {"bias": x}) * 10

    result, found = record(function, [torch.ones(1)], [])

    assert isinstance(found, Recording) and sum(call.aside for call in found.calls) == 1
    assert [result.item(), found.run(torch.ones(1)).item(), found.run(torch.full((1,), 5.0)).item()] == [
        40,
        50,
        180,
    ]
    assert calls == [2, 2, 10]


def test_nothing_is_kept_longer_than_it_is_read() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        gc.collect()
        alive = [reference for reference in made if reference() is not None]
        made.append(weakref.ref(x))
        return x.new_full((1,), len(alive))

    def function(x: torch.Tensor) -> torch.Tensor:
        counts = []
        for _ in range(4):
            x = x + 1
            counts.append(aside(watch, x))
        return torch.cat(counts)

    _, found = record(function, [torch.ones(1)], [])
    made.clear()

    assert isinstance(found, Recording)
    assert found.run(torch.ones(1)).tolist() == [0, 0, 0, 0]


def test_a_module_runs_from_its_recording_with_the_weights_that_it_has_by_then() -> None:
    layer = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Dropout(0.5)).eval()
    with torch.inference_mode():
        _, found = record(layer, [torch.randn(2, 4)], layer.parameters())
        assert isinstance(found, Recording)
        for weight in layer.parameters():
            weight.mul_(2)
        x = torch.randn(2, 4)

        assert torch.equal(found.run(x), layer(x))
