"""A peer's life: open the model, join, load, serve, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import torch

from peer.model.artefact import artefact_id
from peer.model.checkpoint import Checkpoint, open_checkpoint, tokenizer_files
from peer.model.quantization import Quantization, choose
from peer.model.quantized_cache import QuantizedCache
from peer.model.span import Span as LoadedSpan
from peer.model.threads import measure_threads
from peer.serving.kv_budget import KvBudget
from peer.serving.service import Offer, Service
from peer.settings import PeerSettings, default_kv_bytes, default_threads
from shared.announcement import LEASE_S, RENEW_EVERY_S, sign_announcement
from shared.background import Background
from shared.channel import Channel, Dialer
from shared.errors import ProtocolError, SettingsError
from shared.identity import Identity
from shared.protocol import Announcement, Path, PeerMessage, PeerState
from shared.relays import Relays
from shared.settings import data_directory
from shared.spans import Span, parse_layers
from shared.tokenizer_files import files_hash

log = logging.getLogger(__name__)

DRAIN_S = 20.0
"""How long a peer that leaves lets its sessions finish; after that their askers re-route."""
UNKNOWN_CONTEXT = 8192
"""Positions offered when the model's config sets no bound (ALiBi models)."""


class Peer:
    """One peer in a swarm. Entering opens the model, joins the relay, loads the layers and announces them.

    `progress(done_bytes, total_bytes)` hears of the loading. Raises ModelNotFound, UnsupportedModel,
    SettingsError or RelayUnreachable, each with one sentence.
    """

    def __init__(
        self,
        settings: PeerSettings,
        identity: Identity,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.settings = settings
        self.identity = identity
        self.relays = Relays(settings.relays, identity)
        self.dialer = Dialer(
            identity,
            self.relays.clients,
            self._handle,
            on_closed=self._channel_closed,
            direct=settings.direct,
            listen=settings.listen,
        )
        self.device, self.dtype = device_and_dtype(settings)
        self.quantization: Quantization | None = None
        self.kv_budget = KvBudget(settings.kv_bytes if settings.kv_bytes is not None else default_kv_bytes())
        self.name = settings.name or socket.gethostname()[:64]
        self.model = ""
        self.artefact = ""
        self.layers = Span(0, 0)
        self.layer_count = 0
        self.service: Service | None = None
        self._progress = progress
        self._unwanted = False
        self._offer: Offer | None = None
        self._state: PeerState = "joining"
        self._sequence = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            torch.set_num_threads(self.settings.threads or default_threads())
            self.quantization = await asyncio.to_thread(self._quantization)
            checkpoint = await asyncio.to_thread(open_checkpoint, self.settings.model)
            await asyncio.to_thread(self._describe, checkpoint)
            await stack.enter_async_context(self.relays)
            await stack.enter_async_context(self.dialer)
            # Announced before it loads, so that two newcomers do not take the same gap.
            tasks = await stack.enter_async_context(Background())
            tasks.start(self._keep_announced())
            span = await self._loaded(checkpoint)
            await stack.enter_async_context(self._serve(span))
            await self.announce("serving")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.announce("left")
        await self._stack.__aexit__(kind, error, trace)

    async def drain(self, timeout_s: float = DRAIN_S) -> bool:
        """Take no new sessions and wait for those that run; True when all of them finished in time."""
        assert self.service is not None
        self.service.draining = True
        await self.announce("draining")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.service.drained(), timeout_s)
        return self.service.session_count == 0

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def numbers(self) -> str:
        """In what this peer computes, for people: `float32`, or `float32/int4` when weights are quantized."""
        return f"{self.dtype_name}/{self.quantization.name}" if self.quantization else self.dtype_name

    # ------------------------------------------------------------ joining

    def _quantization(self) -> Quantization | None:
        exact = self.settings.dtype != "auto"
        kernels = data_directory() / "kernels"
        return choose(self.settings.quantize, self.dtype, self.device, kernels, exact=exact)

    def _describe(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.name
        self.layer_count = checkpoint.layer_count
        self.layers = parse_layers(self.settings.layers, checkpoint.layer_count)
        self.artefact = artefact_id(
            checkpoint, self.dtype_name, self.quantization.name if self.quantization else None
        )
        context = getattr(checkpoint.config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
        self._offer = Offer(
            artefact=self.artefact,
            context_length=context,
            tokenizer_files=tokenizer_files(checkpoint),
            max_sessions=self.settings.max_sessions,
        )

    async def _loaded(self, checkpoint: Checkpoint) -> LoadedSpan:
        try:
            return await asyncio.to_thread(self._load, checkpoint)
        except BaseException:
            self._unwanted = True
            # Else the others would hope for these layers until the announcement runs out.
            await self.announce("left")
            raise

    def _load(self, checkpoint: Checkpoint) -> LoadedSpan:
        span = LoadedSpan.load(
            checkpoint,
            self.layers.start,
            self.layers.end,
            dtype=self.dtype,
            device=self.device,
            quantization=self.quantization,
            quantized=QuantizedCache(data_directory() / "quantized" / self.artefact),
            int8_kv=self.settings.kv_dtype == "int8",
            progress=self._report,
        )
        if self.device.type == "cpu" and self.settings.threads is None:
            log.info("computing with %d threads", measure_threads(span, os.cpu_count() or 1))
        return span

    def _report(self, done_bytes: int, total_bytes: int) -> None:
        # A process waits for its threads when it ends, and many tensors or files may still be to come.
        if self._unwanted:
            raise asyncio.CancelledError
        if self._progress is not None:
            self._progress(done_bytes, total_bytes)

    def _serve(self, span: LoadedSpan) -> Service:
        assert self._offer is not None
        self.service = Service(self.identity.id, span, self._offer, self.kv_budget, self.dialer.channel)
        return self.service

    # ------------------------------------------------------------ announcing

    async def announce(self, state: PeerState) -> None:
        """Tell the swarm, on every relay, what this peer serves now."""
        self._state = state
        await self.relays.announce(sign_announcement(self.identity, self._announcement()))

    def _announcement(self) -> Announcement:
        assert self._offer is not None
        now = time.time()
        # Rises even when the clock is set back while we run.
        self._sequence = max(self._sequence + 1, int(now * 1000))
        return Announcement(
            peer=self.identity.id,
            sequence=self._sequence,
            issued_at=now,
            expires_at=now + LEASE_S,
            state=self._state,
            name=self.name,
            model=self.model,
            artefact=self.artefact,
            tokenizer=files_hash(self._offer.tokenizer_files),
            layer_count=self.layer_count,
            start=self.layers.start,
            end=self.layers.end,
            dtype=self.numbers,
            device=self.device.type,
            context_length=self._offer.context_length,
            kv_tokens_free=self.service.kv_tokens_free if self.service else 0,
            ms_per_layer=self.service.ms_per_layer if self.service else None,
            sessions=self.service.session_count if self.service else 0,
            wait_ms=self.service.wait_ms if self.service else 0.0,
            relays=self.relays.connected_urls,
        )

    async def _keep_announced(self) -> None:
        while True:
            await self.announce(self._state)
            await asyncio.sleep(RENEW_EVERY_S)

    # ------------------------------------------------------------ channels

    async def _handle(
        self, channel: Channel, message: PeerMessage, body: bytes | memoryview, path: Path
    ) -> None:
        if self.service is None:
            raise ProtocolError("this peer is still loading its layers")
        await self.service.handle(channel, message, body, path)

    def _channel_closed(self, channel: Channel) -> None:
        if self.service is not None:
            self.service.channel_closed(channel)


def device_and_dtype(settings: PeerSettings) -> tuple[torch.device, torch.dtype]:
    """Where and in which numbers to compute. Raises SettingsError for a device this machine does not have."""
    device = settings.device
    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # some devices hold tensors and no numbers
    except (RuntimeError, AssertionError):
        raise SettingsError(
            f"--device {device} is not on this machine; leave it out to take what is"
        ) from None
    if settings.dtype != "auto":
        return found, getattr(torch, settings.dtype)
    # bf16 and fp16 products are seven times slower than f32 on a CPU without instructions for them.
    return found, torch.float32 if found.type == "cpu" else torch.bfloat16
