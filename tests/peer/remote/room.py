"""A real swarm for tests that know no asyncio: it lives in a thread of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from peer.model.anatomy import find_layers
from peer.remote import RemoteModel
from peer.remote.background_loop import BackgroundLoop
from tests.harness.swarm import Swarm

RELATIVE = 1e-5
"""How far gradients may be from those of the unsplit model, in float32."""


class Room:
    """Peers that serve a model, and remote models that use them."""

    def __init__(self, model: Path, **spans: tuple[int, int]) -> None:
        self.model = model
        self.loop = BackgroundLoop()
        self.swarm: Swarm
        self._spans = spans
        self._opened: list[Any] = []

    def __enter__(self) -> Self:
        self.swarm = self.loop.run(_made(self.model))
        self.loop.run(self.swarm.start(**self._spans))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for remote in self._opened:
            remote.close()
        self.loop.run(self.swarm.__aexit__(None, None, None))
        self.loop.stop()

    def start(self, **spans: tuple[int, int]) -> None:
        """More peers."""
        self.loop.run(self.swarm.start(**spans))

    def stop(self, name: str) -> None:
        """A peer goes without a word to its askers."""
        self.loop.run(self.swarm.stop(name))

    def remote(self, **options: Any) -> Any:  # noqa: ANN401
        """The model, its layers in this room."""
        remote = RemoteModel.from_swarm(str(self.model), relays=self.swarm.relay_urls, **options)
        self._opened.append(remote)
        return remote

    def passes(self) -> dict[str, int]:
        """What each peer has computed for trainings."""
        served = ((name, peer.service) for name, peer in self.swarm.peers.items())
        return {name: service.training.passes for name, service in served if service is not None}

    def bytes_per_token(self, name: str) -> int:
        """KV memory that a peer needs for one position through all its layers."""
        service = self.swarm.peers[name].service
        assert service is not None
        return service.span.kv_bytes_per_token(service.span.start, service.span.end)

    def when(self, name: str, passes: int, act: Callable[[], Any]) -> None:
        """Do something in the room's own thread as soon as a peer has computed so many passes."""
        training = self.swarm.peers[name].service.training  # type: ignore[union-attr]
        own = training._serve

        async def serve(job: Any) -> None:  # noqa: ANN401
            await own(job)
            if training.passes == passes:
                await act()

        training._serve = serve  # type: ignore[method-assign]


async def _made(model: Path) -> Swarm:
    return await Swarm(model).__aenter__()


def close(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal but for rounding, measured by the size of the whole tensor."""
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    assert error <= RELATIVE, error


def with_deep_prompts(whole: nn.Module, prompts: torch.Tensor) -> nn.Module:
    """transformers' own model, with prompts added at the entry of each layer by hooks."""
    whole = copy.deepcopy(whole)
    for layer, prompt in zip(find_layers(whole), prompts, strict=True):  # type: ignore[arg-type]
        layer.register_forward_pre_hook(_added(prompt), with_kwargs=True)
    return whole


def _added(prompt: torch.Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = torch.cat([prompt, prompt.new_zeros(hidden.shape[1] - len(prompt), prompt.shape[1])])
        hidden = hidden + rows
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook


def padded(batch: int, count: int, blank: Sequence[int]) -> torch.Tensor:
    """A mask whose rows begin with so many blanks."""
    mask = torch.ones(batch, count, dtype=torch.int64)
    for row, length in enumerate(blank):
        mask[row, :length] = 0
    return mask
