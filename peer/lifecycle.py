"""A peer's life: open the model, take a place, load, serve, move to another place, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path as Directory
from types import TracebackType
from typing import Literal, Self

import torch

from peer.benchmark import LayerSizes, Speed, SpeedBook, layer_sizes, measure_speed
from peer.devices import choose_devices, compute_dtype, free_bytes, spread
from peer.model.artefact import artefact_id
from peer.model.checkpoint import Checkpoint, open_checkpoint, tokenizer_files
from peer.model.errors import UnsupportedModel
from peer.model.peft_files import StoredAdapter, open_adapter
from peer.model.quantization import Quantization, choose
from peer.model.quantized_cache import QuantizedCache
from peer.model.span import Span as LoadedSpan
from peer.model.threads import measure_threads
from peer.neighbours import look_around
from peer.placement import (
    DRAIN_S,
    PROPAGATION_S,
    RECONSIDER_S,
    Choice,
    Placed,
    choose_move,
    choose_span,
    usual_speed,
    yields,
)
from peer.serving.kv_budget import KvBudget
from peer.serving.service import Offer, Service
from peer.settings import Budget, PeerSettings, default_threads, memory_budget
from shared.announcement import LEASE_S, RENEW_EVERY_S, sign_announcement
from shared.background import Background
from shared.channel import Channel, Dialer
from shared.errors import CorollaError, ProtocolError, SettingsError
from shared.identity import Identity, PeerId
from shared.protocol import Announcement, HostedAdapter, Path, PeerMessage, PeerState
from shared.relays import Relays
from shared.settings import data_directory
from shared.spans import Span, parse_layers
from shared.tokenizer_files import files_hash

log = logging.getLogger(__name__)

LOOK_S = 3.0
"""A load that changed much is announced before the next renewal, but not more often than this."""
UNKNOWN_CONTEXT = 8192
"""Positions offered when the model's config sets no bound (ALiBi models)."""


class Peer:
    """One peer in a swarm. Entering opens the model, joins the relay, loads the layers and announces them.

    `progress(done_bytes, total_bytes)` hears of the loading, `notice` of every place taken, in words.
    Raises ModelNotFound, UnsupportedModel, SettingsError or RelayUnreachable, each with one sentence.
    """

    def __init__(
        self,
        settings: PeerSettings,
        identity: Identity,
        *,
        progress: Callable[[int, int], None] | None = None,
        notice: Callable[[str], None] = log.info,
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
        self.devices = choose_devices(settings.device)
        self.device = self.devices[0]
        self.dtype = compute_dtype(settings, self.device)
        self.quantization: Quantization | None = None
        self.memory: Budget = memory_budget(settings, sum(map(free_bytes, self.devices)))
        self.kv_budget = KvBudget(self.memory.kv_bytes)
        self.name = settings.name or socket.gethostname()[:64]
        self.model = ""
        self.artefact = ""
        self.adapters: list[StoredAdapter] = []
        self.layers = Span(0, 0)
        self.layer_count = 0
        self.service: Service | None = None
        self.speed: Speed | None = None
        self._progress = progress
        self._notice = notice
        self._options: list[Span] = []
        """Spans that this machine could hold; none when its owner chose one."""
        self._serving = AsyncExitStack()
        self._leaving = asyncio.Event()
        self._told: Announcement | None = None
        """What was announced last."""
        self._unwanted = False
        self._moved_among: frozenset[PeerId] | None = None
        """Who else was there when this peer moved; while nobody joins or leaves, it stays."""
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
            tasks = await stack.enter_async_context(Background())
            # Announced before it loads, so that two newcomers do not take the same gap.
            await self._take_place(checkpoint)
            tasks.start(self._keep_announced())
            await self._serve(await self._loaded(checkpoint))
            stack.push_async_callback(self._stop_serving)
            if self._options and len(self.layers) < self.layer_count:
                tasks.start(self._keep_useful(checkpoint))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.announce("left")
        await self._stack.__aexit__(kind, error, trace)

    async def drain(self, timeout_s: float = DRAIN_S) -> bool:
        """Before leaving: take no new sessions, wait for those that run; True when all finished in time."""
        self._leaving.set()
        return await self._drain(timeout_s)

    async def _drain(self, timeout_s: float = DRAIN_S) -> bool:
        if self.service is None:
            return True  # on the way from one span to another
        self.service.drain()
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
        if self.settings.layers != "auto":
            self.layers = parse_layers(self.settings.layers, checkpoint.layer_count)
        self.artefact = artefact_id(
            checkpoint, self.dtype_name, self.quantization.name if self.quantization else None
        )
        self.adapters = [open_adapter(Directory(directory)) for directory in self.settings.adapters]
        context = getattr(checkpoint.config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
        self._offer = Offer(
            artefact=self.artefact,
            context_length=context,
            tokenizer_files=tokenizer_files(checkpoint),
            max_sessions=self.settings.max_sessions,
            adapters={hosted.id: hosted.adapter for hosted in self.adapters},
        )

    # ------------------------------------------------------------ choosing layers

    async def _take_place(self, checkpoint: Checkpoint) -> None:
        """Announce the layers that this peer is about to load: those it was told, or those that help most."""
        if self.settings.layers == "auto":
            self._options = await asyncio.to_thread(self._find_options, checkpoint)
            self.layers = self._options[0]
        if not self._options or len(self.layers) == self.layer_count:
            await self.announce("joining")
            return
        self.speed = await asyncio.to_thread(self._speed_beforehand, checkpoint)
        choice = self._choose(await self._others())
        await self.announce("joining")
        await asyncio.sleep(PROPAGATION_S)
        others = await self._others()
        if yields(self.identity.id, self.layers, others):
            choice = self._choose(others)
            await self.announce("joining")
        self._notice(f"taking layers {choice.span}: {choice.why}")

    def _choose(self, others: Sequence[Placed]) -> Choice:
        choice = choose_span(others, self._options, self._assumed_speed(others), self.layer_count)
        self.layers = choice.span
        return choice

    def _assumed_speed(self, others: Sequence[Placed]) -> float:
        return self.speed.throughput if self.speed else usual_speed([other.speed for other in others])

    def _find_options(self, checkpoint: Checkpoint) -> list[Span]:
        sizes: LayerSizes = layer_sizes(checkpoint, self.dtype, self.quantization, self.device)
        options = sizes.spans_within(self.memory.layers_bytes)
        if not options:
            raise SettingsError(
                f"no layer of {checkpoint.name} fits: each takes {max(sizes.layers) / 1e9:.2f} GB, and"
                f" {self.memory.layers_bytes / 1e9:.2f} GB are there for layers; give more with --memory"
            )
        return options

    def _speed_beforehand(self, checkpoint: Checkpoint) -> Speed | None:
        """As measured at an earlier start, or with one layer now if that needs no download."""
        known = self._speed_book().find(self.artefact, self.device, self.settings.threads)
        if known is not None or not checkpoint.is_here:
            return known
        middle = self.layer_count // 2
        return self._measured(self._load(checkpoint, Span(middle, middle + 1)))

    def _measured(self, span: LoadedSpan) -> Speed:
        speed = measure_speed(span, self.settings.max_sessions)
        if self._options:
            self._speed_book().keep(self.artefact, self.device, self.settings.threads, speed)
        return speed

    def _speed_book(self) -> SpeedBook:
        return SpeedBook(data_directory() / "speeds")

    async def _others(self) -> list[Placed]:
        """Every other peer of this artefact, as the relays show them now."""
        found = await look_around(self.relays, self.model, self.artefact)
        return [other for other in found if other.peer != self.identity.id]

    # ------------------------------------------------------------ moving

    async def _keep_useful(self, checkpoint: Checkpoint) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * RECONSIDER_S)
            await self.reconsider(checkpoint)

    async def reconsider(self, checkpoint: Checkpoint) -> bool:
        """Move to other layers if that helps the swarm enough, after running answers; True when it did."""
        if self._leaving.is_set() or self._state != "serving":
            return False
        others = await self._others()
        if self._moved_among not in (None, _ids(others)):
            self._moved_among = None
            await self.announce(self._state)
        if self._better_place(others) is None:
            return False
        # Told before it is done, then looked at again: nobody else near by goes away at the same time.
        await self.announce("draining")
        await asyncio.sleep(PROPAGATION_S)
        others = await self._others()
        choice = self._better_place(others)
        if self._leaving.is_set():
            return False
        if choice is None:
            await self.announce("serving")
            return False
        self._notice(f"moving to layers {choice.span}: {choice.why}")
        await self._drain()
        if not self._leaving.is_set():
            self._moved_among = _ids(others)
            await self._move(checkpoint, choice.span)
        return not self._leaving.is_set()

    def _better_place(self, others: Sequence[Placed]) -> Choice | None:
        state: Literal["draining", "serving"] = "draining" if self._state == "draining" else "serving"
        me = Placed(self.identity.id, self.layers, self._assumed_speed(others), state, self._movable)
        return choose_move(me, others, self._options, self.layer_count)

    @property
    def _movable(self) -> bool:
        return bool(self._options) and len(self.layers) < self.layer_count and self._moved_among is None

    async def _move(self, checkpoint: Checkpoint, span: Span) -> None:
        before = self.layers
        # The old layers go first: there is seldom memory for both.
        await self._stop_serving()
        # `python -m peer` has frozen what was loaded, the layers that go among it.
        frozen = gc.get_freeze_count() > 0
        gc.unfreeze()
        await asyncio.to_thread(gc.collect)
        self.layers = span
        await self.announce("joining")
        try:
            loaded = await asyncio.to_thread(self._load, checkpoint, span)
        except CorollaError as error:
            log.warning(
                "layers %s could not be loaded, so layers %s are served again: %s", span, before, error
            )
            self.layers = before
            loaded = await self._loaded(checkpoint)
        if frozen:
            await asyncio.to_thread(gc.collect)
            gc.freeze()
        await self._serve(loaded)

    # ------------------------------------------------------------ loading

    async def _loaded(self, checkpoint: Checkpoint) -> LoadedSpan:
        try:
            return await asyncio.to_thread(self._load, checkpoint, self.layers)
        except BaseException:
            self._unwanted = True
            # Else the others would hope for these layers until the announcement runs out.
            await self.announce("left")
            raise

    def _load(self, checkpoint: Checkpoint, layers: Span) -> LoadedSpan:
        try:
            span = self._load_onto(self.devices, checkpoint, layers)
        except UnsupportedModel as error:
            if len(self.devices) == 1:
                raise
            log.warning("these layers do not work on several devices, so one has all: %s", error)
            span = self._load_onto(self.devices[:1], checkpoint, layers)
        if self.device.type == "cpu" and self.settings.threads is None:
            log.info("computing with %d threads", measure_threads(span, os.cpu_count() or 1))
        return span

    def _load_onto(self, devices: Sequence[torch.device], checkpoint: Checkpoint, layers: Span) -> LoadedSpan:
        return LoadedSpan.load(
            checkpoint,
            layers.start,
            layers.end,
            dtype=self.dtype,
            device=devices[0],
            layer_devices=self._layer_devices(devices, checkpoint, layers),
            quantization=self.quantization,
            quantized=QuantizedCache(data_directory() / "quantized" / self.artefact),
            int8_kv=self.settings.kv_dtype == "int8",
            progress=self._report,
        )

    def _layer_devices(
        self, devices: Sequence[torch.device], checkpoint: Checkpoint, layers: Span
    ) -> dict[int, torch.device]:
        """Where each layer is to lie, if there are several GPUs."""
        if len(devices) == 1:
            return {}
        sizes = layer_sizes(checkpoint, self.dtype, self.quantization, self.device)
        ends = (sizes.first if layers.start == 0 else 0) + (
            sizes.last if layers.end == self.layer_count else 0
        )
        places = spread(
            sizes.layers[layers.start : layers.end], ends, [free_bytes(device) for device in devices]
        )
        numbered = enumerate(places, layers.start)
        return {layer: devices[place] for layer, place in numbered}

    def _report(self, done_bytes: int, total_bytes: int) -> None:
        # A process waits for its threads when it ends, and many tensors or files may still be to come.
        if self._unwanted:
            raise asyncio.CancelledError
        if self._progress is not None:
            self._progress(done_bytes, total_bytes)

    async def _serve(self, span: LoadedSpan) -> None:
        """Take sessions for a span that is loaded, and announce it."""
        assert self._offer is not None
        if self.speed is None:
            self.speed = await asyncio.to_thread(self._measured, span)
        service = Service(self.identity.id, span, self._offer, self.kv_budget, self.dialer.channel)
        self.service = await self._serving.enter_async_context(service)
        await self.announce("serving")

    async def _stop_serving(self) -> None:
        await self._serving.aclose()
        self.service = None

    # ------------------------------------------------------------ announcing

    async def announce(self, state: PeerState) -> None:
        """Tell the swarm, on every relay, what this peer serves now."""
        self._state = state
        self._told = self._announcement()
        await self.relays.announce(sign_announcement(self.identity, self._told))

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
            ms_per_layer=self._ms_per_layer(),
            throughput=self.speed.throughput if self.speed else None,
            movable=self._movable,
            sessions=self.service.session_count if self.service else 0,
            wait_ms=self.service.wait_ms if self.service else 0.0,
            relays=self.relays.connected_urls,
            adapters=[HostedAdapter(hosted.name, hosted.id) for hosted in self.adapters],
        )

    def _ms_per_layer(self) -> float | None:
        """As sessions found it; until there were any, as measured at the start."""
        if self.service is not None and self.service.ms_per_layer is not None:
            return self.service.ms_per_layer
        return self.speed.ms_per_layer if self.speed else None

    async def _keep_announced(self) -> None:
        while True:
            await self.announce(self._state)
            for _ in range(round(RENEW_EVERY_S / LOOK_S)):
                await asyncio.sleep(LOOK_S)
                if self._told is not None and much_changed(self._told, self._announcement()):
                    break

    # ------------------------------------------------------------ channels

    def _handle(self, channel: Channel, message: PeerMessage, body: bytes | memoryview, path: Path) -> None:
        if self.service is None:
            raise ProtocolError("this peer is still loading its layers")
        self.service.handle(channel, message, body, path)

    def _channel_closed(self, channel: Channel) -> None:
        if self.service is not None:
            self.service.channel_closed(channel)


def much_changed(told: Announcement, now: Announcement) -> bool:
    """Whether those who plan routes by what was told would be far off."""
    more, fewer = max(told.sessions, now.sessions), min(told.sessions, now.sessions)
    slower, faster = max(told.wait_ms, now.wait_ms), min(told.wait_ms, now.wait_ms)
    roomier, fuller = (f(told.kv_tokens_free, now.kv_tokens_free) for f in (max, min))
    return more > 2 * fewer + 4 or slower > 2 * faster + 50 or roomier > 2 * fuller


def _ids(others: Sequence[Placed]) -> frozenset[PeerId]:
    return frozenset(other.peer for other in others)
