"""A real swarm in one process: a relay, peers with real channels, and a client that asks.

async with Swarm(model) as swarm:
    await swarm.start(ann=(0, 4), bob=(4, 8))
    answer = swarm.ask([1, 2, 3])
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM

from peer.lifecycle import Peer
from peer.settings import PeerSettings
from relay.app import Relay
from relay.settings import RelaySettings
from shared.client.directory import Directory
from shared.client.session import Drawn, Request, Rerouted
from shared.client.swarm_client import SwarmClient
from shared.identity import Identity, PeerId
from shared.protocol import Sampling

READY_S = 30.0


class Swarm:
    """Names stand for peers; a peer is started with the layers [start, end) it serves.

    Weights are exact unless told otherwise, so that answers equal the unsplit model's token for token.
    """

    def __init__(
        self,
        model: Path,
        *,
        direct: bool = True,
        kv_bytes: int = 1 << 30,
        relay_count: int = 1,
        quantize: str = "none",
    ) -> None:
        self.model = model
        self.relays = [Relay(RelaySettings(port=0)) for _ in range(relay_count)]
        self.peers: dict[str, Peer] = {}
        self.client: SwarmClient
        self._direct = direct
        self._kv_bytes = kv_bytes
        self._quantize = quantize
        self._stack = AsyncExitStack()
        self._relay_stacks: list[AsyncExitStack] = []
        self._peer_stacks: dict[str, AsyncExitStack] = {}

    async def __aenter__(self) -> Self:
        for relay in self.relays:
            # Its own stack, so that a test may end it earlier.
            stack = await self._stack.enter_async_context(AsyncExitStack())
            await stack.enter_async_context(relay)
            self._relay_stacks.append(stack)
        self.client = await self._stack.enter_async_context(
            SwarmClient(Identity.generate(), self.relay_urls, direct=self._direct)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.peers):
            await self.stop(name)
        await self._stack.__aexit__(kind, error, trace)

    # ------------------------------------------------------------ relays

    @property
    def relay(self) -> Relay:
        """The first, and in most tests the only one."""
        return self.relays[0]

    @property
    def relay_urls(self) -> tuple[str, ...]:
        return tuple(relay.url for relay in self.relays)

    async def stop_relay(self, number: int) -> None:
        """End a relay for good, with all that hangs on it."""
        await self._relay_stacks[number].aclose()

    # ------------------------------------------------------------ peers

    async def start(self, **spans: tuple[int, int]) -> None:
        """Start peers and wait until the client sees them serve."""
        for name, (start, end) in spans.items():
            await self.start_one(name, f"{start}:{end}")

    async def start_one(
        self,
        name: str,
        layers: str,
        *,
        model: Path | None = None,
        relays: Sequence[int] | None = None,
        adapters: Sequence[str] = (),
    ) -> Peer:
        settings = PeerSettings(
            relays=self.relay_urls if relays is None else tuple(self.relays[number].url for number in relays),
            model=str(model or self.model),
            layers=layers,
            name=name,
            kv_bytes=self._kv_bytes,
            threads=1,
            quantize=self._quantize,
            direct=self._direct,
            adapters=tuple(adapters),
        )
        stack = AsyncExitStack()
        peer = await stack.enter_async_context(Peer(settings, Identity.generate()))
        self.peers[name] = peer
        self._peer_stacks[name] = stack
        await self.until(lambda: name in {live.name for live in self.client.directory.serving(peer.artefact)})
        return peer

    async def stop(self, name: str) -> None:
        """End a peer without letting its sessions finish."""
        del self.peers[name]
        await self._peer_stacks.pop(name).aclose()

    def name(self, peer: str) -> str:
        return self.client.directory.name(PeerId(peer))

    @property
    def artefact(self) -> str:
        return next(iter(self.peers.values())).artefact

    def reserved_bytes(self) -> dict[str, int]:
        """KV memory that each peer holds for sessions."""
        return {name: peer.kv_budget.reserved_bytes for name, peer in self.peers.items()}

    def standbys(self) -> dict[str, tuple[int, int]]:
        """Who follows an answer of the client, and for which layers."""
        following = [span for each in self.client._generations.values() for span in each.standbys]
        return {self.name(span.peer): (span.start, span.end) for span in following}

    # ------------------------------------------------------------ asking

    def ask(
        self,
        prompt: Sequence[int],
        *,
        new: int = 12,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> AsyncGenerator[Drawn | Rerouted, None]:
        request = Request(
            artefact=self.artefact,
            prompt=list(prompt),
            max_new_tokens=new,
            sampling=sampling or Sampling(),
            stop_tokens=stop_tokens,
        )
        return self.client.generate(request)

    def reference(self, prompt: Sequence[int], *, new: int = 12) -> list[int]:
        """What transformers' own greedy generation gives on the unsplit model."""
        return reference(self.model, prompt, new)

    def logprobs(self, text: Sequence[int]) -> torch.Tensor:
        """How likely the unsplit model finds each token after each beginning of a text, [count, vocab]."""
        whole: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        with torch.inference_mode():
            logits = whole.eval()(input_ids=torch.tensor([list(text)])).logits[0]
        return torch.log_softmax(logits, 1)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the directory shows."""
        await until(self.client.directory, condition, READY_S)


async def until(directory: Directory, condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait for something that a directory shows. Raises TimeoutError."""
    changed = asyncio.Event()
    stop = directory.listen(changed.set)
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                changed.clear()
                await changed.wait()
    finally:
        stop()


def tokens(events: Sequence[Drawn | Rerouted]) -> list[int]:
    """The token ids among the events of an answer."""
    return [event.token for event in events if isinstance(event, Drawn)]


def reference(model: Path, prompt: Sequence[int], new: int) -> list[int]:
    """Greedy continuation by transformers on the whole model, in float32, never stopping early."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.eval()
    ids = torch.tensor([list(prompt)])
    whole.generation_config.eos_token_id = None
    made = whole.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in made[0, len(prompt) :]]
