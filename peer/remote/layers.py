"""A model's layers in a swarm, as torch modules: slices that gradients flow through, and modules between."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peer.remote.background_loop import BackgroundLoop
from peer.remote.carried import Carried
from peer.remote.chain import Chain, Gradients, Leg, Passed
from peer.serving.passes import PROMPT

if TYPE_CHECKING:
    from peer.remote.session import RemoteSession

IN_FLIGHT = 8
"""Micro-batches of one pass that may be under way at once: more would only wait at the peers."""


class Swarm:
    """What all slices of one model share: the way to its peers."""

    def __init__(self, loop: BackgroundLoop, chain: Chain) -> None:
        self.loop = loop
        self.chain = chain
        self.micro_batches: int | None = None
        """Into how many parts a batch is cut; None for one more than there are hops, so that none idles."""

    def forward(
        self, states: torch.Tensor, start: int, end: int, carried: Carried, *, each: bool = False
    ) -> tuple[list[torch.Tensor], list[tuple[slice, list[Leg]]]]:
        """A batch through layers [start, end), in micro-batches that follow one another over the hops."""
        return self.loop.run(self._forward(states, start, end, carried, each=each))

    async def _forward(
        self, states: torch.Tensor, start: int, end: int, carried: Carried, *, each: bool
    ) -> tuple[list[torch.Tensor], list[tuple[slice, list[Leg]]]]:
        cuts = self._cuts(len(states), start, end, carried)
        turns = asyncio.Semaphore(IN_FLIGHT)

        async def one(cut: slice) -> Passed:
            async with turns:
                return await self.chain.forward(states[cut], start, end, carried.rows(cut), each=each)

        passed = await _all([one(cut) for cut in cuts])
        behind = [torch.cat(group) for group in zip(*(part.behind for part in passed), strict=True)]
        return behind, [(cut, part.legs) for cut, part in zip(cuts, passed, strict=True)]

    def backward(
        self, legs: list[tuple[slice, list[Leg]]], gradient: torch.Tensor, carried: Carried, *, learns: bool
    ) -> tuple[torch.Tensor, Gradients]:
        """The gradients of a batch, and the sums of all that its rows share."""
        return self.loop.run(self._backward(legs, gradient, carried, learns=learns))

    async def _backward(
        self, legs: list[tuple[slice, list[Leg]]], gradient: torch.Tensor, carried: Carried, *, learns: bool
    ) -> tuple[torch.Tensor, Gradients]:
        turns = asyncio.Semaphore(IN_FLIGHT)

        async def one(cut: slice, mine: list[Leg]) -> tuple[torch.Tensor, Gradients]:
            async with turns:
                return await self.chain.backward(mine, gradient[cut], carried.rows(cut), learns=learns)

        found = await _all([one(cut, mine) for cut, mine in legs])
        sums = Gradients()
        for _, shared in found:
            for name, tensor in shared.items():
                sums[name] = sums[name] + tensor if name in sums else tensor
        return torch.cat([part for part, _ in found]), sums

    def _cuts(self, batch: int, start: int, end: int, carried: Carried) -> list[slice]:
        wanted = self.micro_batches or len(self.chain.plan_or_none(start, end, carried.hosted)) + 1
        size = -(-batch // max(1, min(batch, wanted)))
        return [slice(first, min(first + size, batch)) for first in range(0, batch, size)]


async def _all(work: Sequence[Any]) -> list[Any]:
    """The results of all, or the first error once the others have been cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class _Through(torch.autograd.Function):
    """Layers of a swarm as one operation. `leaves` are what is carried and wants a gradient, by `names`."""

    @staticmethod
    def forward(
        context: Any,  # noqa: ANN401
        swarm: Swarm,
        span: tuple[int, int],
        carried: Carried,
        names: list[str],
        states: torch.Tensor,
        *leaves: torch.Tensor,
    ) -> torch.Tensor:
        behind, legs = swarm.forward(states.detach(), *span, carried)
        context.call = swarm, legs, carried, names
        context.shape = states.dtype
        context.leaves = [leaf.dtype for leaf in leaves]
        return behind[-1].to(states.dtype)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        swarm, legs, carried, names = context.call
        learns = any(not name.startswith(PROMPT) for name in names)
        found, shared = swarm.backward(legs, gradients[0], carried, learns=learns)
        leaves = [shared[name].to(kind) for name, kind in zip(names, context.leaves, strict=True)]
        return None, None, None, None, found.to(context.shape), *leaves


class RemoteLayers(nn.Module):
    """Layers [start, end) of a model in a swarm: a module, and a sequence of smaller ones.

    `layers[2:5](hidden_states)` is differentiable; `insert` puts a module of one's own before a layer.
    """

    def __init__(self, swarm: Swarm, start: int, end: int) -> None:
        super().__init__()
        self._swarm = (swarm,)
        self.start, self.end = start, end
        self.between = nn.ModuleDict()

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int | slice) -> RemoteLayers:
        first, last, step = (
            index.indices(len(self)) if isinstance(index, slice) else (*_single(index, len(self)), 1)
        )
        if step != 1 or first >= last:
            raise IndexError("a slice of layers is a run of at least one, in order")
        part = RemoteLayers(self._swarm[0], self.start + first, self.start + last)
        for layer, module in self.between.items():
            if part.start <= int(layer) < part.end:
                part.between[layer] = module
        return part

    def __iter__(self) -> Iterator[RemoteLayers]:
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        return f"{self.start}:{self.end}"

    @property
    def swarm(self) -> Swarm:
        """The way to the peers."""
        return self._swarm[0]

    def insert(self, layer: int, module: nn.Module) -> None:
        """Let hidden states pass through `module` before they enter this layer. It keeps their shape."""
        if not self.start <= layer < self.end:
            raise IndexError(f"layer {layer} is not among {self.start}:{self.end}")
        self.between[str(layer)] = module

    def session(self, room: int) -> RemoteSession:
        """Keys and values of one batch of up to `room` positions, for these layers."""
        from peer.remote.session import RemoteSession

        return RemoteSession(self, room)

    def runs(self) -> list[tuple[int, int]]:
        """The layers between which nothing was put."""
        edges = sorted({self.start, self.end, *(int(layer) for layer in self.between)})
        return list(itertools.pairwise(edges))

    def enter(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """What a module of one's own makes of hidden states that are about to enter a layer."""
        if str(layer) not in self.between:
            return states
        changed: torch.Tensor = self.between[str(layer)](states)
        return changed

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [batch, count, width] behind the last of these layers."""
        return self.run(hidden_states, Carried(mask=attention_mask, positions=position_ids), {})

    def run(self, states: torch.Tensor, carried: Carried, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        """As `forward`; `leaves` are those carried tensors, by their names on the wire, that learn."""
        for start, end in self.runs():
            states = self.enter(start, states)
            mine = {name: leaf for name, leaf in leaves.items() if start <= _layer(name, carried) < end}
            arguments = self.swarm, (start, end), carried, list(mine), states, *mine.values()
            states = _Through.apply(*arguments)  # type: ignore[no-untyped-call]
        return states

    def each(self, states: torch.Tensor, carried: Carried) -> list[torch.Tensor]:
        """The hidden states behind each of the layers, without gradients."""
        behind: list[torch.Tensor] = []
        for start, end in self.runs():
            found, _ = self.swarm.forward(self.enter(start, states).detach(), start, end, carried, each=True)
            behind += [one.to(states.dtype) for one in found]
            states = behind[-1]
        return behind


def _layer(name: str, carried: Carried) -> int:
    if name.startswith(PROMPT):
        return int(name.removeprefix(PROMPT))
    return carried.layer_of[name[:-2]]


def _single(index: int, length: int) -> tuple[int, int]:
    if not -length <= index < length:
        raise IndexError(f"layer {index} of {length}")
    index %= length
    return index, index + 1
