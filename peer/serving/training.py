"""Serve those who hold a model's ends: forward and backward passes, their sessions, their adapters.

Chats come first: a pass is computed piece by piece, and a piece begins only when no chat's step waits. Among
trainings, steps of sessions go before whole passes, and askers take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from peer.model.errors import BadInputs, CacheFull
from peer.model.extras import Adapter
from peer.model.kv_cache import KVCache
from peer.model.span import Span
from peer.serving.batcher import Batcher
from peer.serving.courtesy import Courtesy
from peer.serving.executor import Executor
from peer.serving.kv_budget import KvBudget
from peer.serving.passes import (
    Budget,
    Inputs,
    PassPace,
    Pieces,
    append,
    backward,
    check_length,
    checked,
    forward,
)
from peer.wire_tensors import FROM_WIRE, pack, unpack
from shared.channel import Channel
from shared.errors import Busy, CorollaError, ProtocolError
from shared.identity import PeerId
from shared.protocol import PREFILL_CHUNK, Backward, Forward, Lend, Outputs, Part, PeerMessage, Refusal

log = logging.getLogger(__name__)

LEASE_S = 60.0
"""An adapter or a session that is not used for so long is forgotten."""
MAX_REQUESTS = 64
"""Of one asker, waiting. One more is refused: a training keeps a few in flight, never so many."""
MAX_BYTES = 1 << 30
"""Of all requests that wait, and of answers that were not read yet."""
MAX_LENT = 4
"""Adapters of one asker. A newer one takes the place of the one used least recently."""
RETRY_S = 0.5

Reply = Callable[[Channel, PeerMessage, bytes, Callable[[], None]], None]
Code = Literal["busy", "lost", "adapter", "artefact", "layers", "draining", "invalid"]


class Unserved(Exception):
    """Why a request is refused."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(eq=False)
class _Job:
    """A request that waits for its turn."""

    channel: Channel
    message: Forward | Backward
    body: bytes | memoryview


@dataclass(eq=False)
class _Session:
    """Keys and values that are kept for an asker, for one batch."""

    cache: KVCache
    used_at: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Lent:
    """An adapter of an asker's own."""

    adapter: Adapter
    used_at: float = field(default_factory=time.monotonic)


class Training:
    """Give it requests; `run` it beside. Each is answered once, by `reply`."""

    def __init__(
        self,
        span: Span,
        artefact: str,
        budget: KvBudget,
        batcher: Batcher,
        courtesy: Courtesy,
        reply: Reply,
        hosted: Mapping[str, Adapter],
    ) -> None:
        self.executor = Executor(niceness=10)
        self.passes = 0
        """Requests computed so far."""
        self._span = span
        self._artefact = artefact
        self._budget = budget
        self._batcher = batcher
        self._courtesy = courtesy
        self._reply = reply
        self._hosted = hosted
        self._pace = PassPace()
        self._steps: deque[_Job] = deque()
        self._waiting: dict[PeerId, deque[_Job]] = {}
        self._bytes = 0
        self._stirred = asyncio.Event()
        self._sessions: dict[tuple[PeerId, str], _Session] = {}
        self._lent: dict[tuple[PeerId, str], _Lent] = {}
        batcher.on_arrival = courtesy.stepped

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._steps) + sum(len(jobs) for jobs in self._waiting.values())

    # ------------------------------------------------------------ requests

    def handle(
        self, channel: Channel, message: Forward | Backward, body: bytes | memoryview, *, draining: bool
    ) -> None:
        """Queue a request, or refuse it at once."""
        waiting = self._waiting.get(channel.peer, ())
        if draining:
            self._refuse(channel, message.request, "draining", "this peer is leaving")
        elif message.artefact != self._artefact:
            self._refuse(channel, message.request, "artefact", "this peer serves other weights")
        elif not self._span.start <= message.start < message.end <= self._span.end:
            served = f"this peer serves layers {self._span.start}–{self._span.end}"
            self._refuse(channel, message.request, "layers", served)
        elif len(waiting) >= MAX_REQUESTS or self._bytes + len(body) > MAX_BYTES:
            self._refuse(channel, message.request, "busy", "too many requests wait here already")
        else:
            job = _Job(channel, message, body)
            self._bytes += len(body)
            if isinstance(message, Forward) and message.session:
                self._steps.append(job)
            else:
                self._waiting.setdefault(channel.peer, deque()).append(job)
            self._stirred.set()

    async def lend(self, channel: Channel, message: Lend, body: bytes | memoryview) -> None:
        """Keep an adapter of an asker for its requests."""
        try:
            adapter = await self.executor.run(self._adapter, message, body)
            self._keep(channel.peer, message.adapter, adapter)
        except Busy as busy:
            self._refuse(channel, message.request, "busy", str(busy))
        except CorollaError as error:
            self._refuse(channel, message.request, "invalid", str(error))
        else:
            self._reply(channel, Outputs(message.request, []), b"", lambda: None)

    def close(self, peer: PeerId, session: str) -> None:
        """A session is over."""
        if self._sessions.pop((peer, session), None) is not None:
            self._budget.release(_held(peer, session))

    def renew(self, peer: PeerId, session: str) -> None:
        """A session goes on."""
        if kept := self._sessions.get((peer, session)):
            kept.used_at = time.monotonic()

    def forget(self, peer: PeerId) -> None:
        """The channel to an asker is gone: what waits of it is of no use. Leases run on, it may come back."""
        for job in self._waiting.pop(peer, ()):
            self._bytes -= len(job.body)

    def sweep(self) -> None:
        """Forget what was not used for a lease."""
        oldest = time.monotonic() - LEASE_S
        for peer, session in [key for key, kept in self._sessions.items() if kept.used_at < oldest]:
            self.close(peer, session)
        for key in [key for key, kept in self._lent.items() if kept.used_at < oldest]:
            self._drop(key)

    def end(self) -> None:
        """Refuse what waits, and give all memory back."""
        jobs = [*self._steps, *(job for waiting in self._waiting.values() for job in waiting)]
        for job in jobs:
            self._refuse(job.channel, job.message.request, "draining", "this peer is leaving")
        for peer, session in list(self._sessions):
            self.close(peer, session)
        for key in list(self._lent):
            self._drop(key)

    # ------------------------------------------------------------ adapters

    def _adapter(self, message: Lend, body: bytes | memoryview) -> Adapter:
        tensors = unpack(message.parts, body)
        paths = {name[:-2] for name in tensors}
        if tensors.keys() != {f"{path}.{side}" for path in paths for side in "AB"}:
            raise BadInputs("an adapter has one A and one B for each matrix")
        if any(not tensor.is_floating_point() for tensor in tensors.values()):
            raise BadInputs("the matrices of an adapter are no whole numbers")
        return self._span.prepare(
            Adapter({path: (tensors[f"{path}.A"], tensors[f"{path}.B"]) for path in paths})
        )

    def _keep(self, peer: PeerId, name: str, adapter: Adapter) -> None:
        mine = sorted((kept.used_at, key) for key, kept in self._lent.items() if key[0] == peer)
        for _, key in mine[: max(0, len(mine) + 1 - MAX_LENT)]:
            self._drop(key)
        self._budget.reserve(_held(peer, name), adapter.nbytes)
        self._lent[peer, name] = _Lent(adapter)

    def _drop(self, key: tuple[PeerId, str]) -> None:
        self._lent.pop(key, None)
        self._budget.release(_held(*key))

    def _find(self, peer: PeerId, name: str) -> Adapter | None:
        if not name:
            return None
        if kept := self._lent.get((peer, name)):
            kept.used_at = time.monotonic()
            return kept.adapter
        if name in self._hosted:
            return self._hosted[name]
        raise Unserved("adapter", "this peer does not have that adapter")

    # ------------------------------------------------------------ computing

    async def run(self) -> None:
        """Compute until cancelled."""
        while True:
            job = self._next()
            if job is None:
                self._stirred.clear()
                await self._stirred.wait()
                continue
            try:
                await self._serve(job)
            finally:
                self._bytes -= len(job.body)

    def _next(self) -> _Job | None:
        if self._steps:
            return self._steps.popleft()
        for peer, waiting in list(self._waiting.items()):
            # Back in line, behind the other askers.
            del self._waiting[peer]
            if waiting:
                job = waiting.popleft()
                if waiting:
                    self._waiting[peer] = waiting
                return job
        return None

    async def _serve(self, job: _Job) -> None:
        request = job.message.request
        if job.channel.closed.is_set():
            return
        try:
            outputs, body = await self._compute(job)
        except Unserved as why:
            self._refuse(job.channel, request, why.code, str(why))
        except (BadInputs, CacheFull, ProtocolError) as error:
            self._refuse(job.channel, request, "invalid", str(error))
        except Exception:
            # One request's mishap is no reason to drop the others; the asker gets no details of ours.
            log.exception("a pass for %s failed", job.channel.peer[:8])
            self._refuse(job.channel, request, "invalid", "an unexpected error, see this peer's log")
        else:
            self.passes += 1
            self._bytes += len(body)
            self._reply(job.channel, outputs, body, lambda: self._give_back(len(body)))

    def _give_back(self, size: int) -> None:
        self._bytes -= size

    async def _compute(self, job: _Job) -> tuple[Outputs, bytes]:
        message = job.message
        adapter = self._find(job.channel.peer, message.adapter)
        budget = Budget(self._courtesy.piece_ms)
        pieces = await self._begin(job, adapter, budget)
        step = isinstance(message, Forward) and bool(message.session)
        while await self._one_piece(pieces, budget, step=step):
            pass
        parts, body = await self.executor.run(_written, pieces.result, _width(message))
        return Outputs(message.request, parts, round(pieces.computed_ms, 3)), body

    async def _begin(self, job: _Job, adapter: Adapter | None, budget: Budget) -> Pieces:
        message, span, pace = job.message, self._span, self._pace
        tensors = await self.executor.run(unpack, message.parts, job.body)
        inputs = checked(span, tensors, message.start, message.end, adapter)
        if isinstance(message, Backward):
            check_length(span, inputs)
            gradient = tensors.get("gradient")
            if gradient is None:
                raise BadInputs("a backward pass brings a gradient")
            return backward(span, inputs, gradient, budget, pace, learns=message.learns)
        if not message.session:
            check_length(span, inputs)
            return forward(span, inputs, budget, pace, each=message.each)
        cache = self._session(job.channel.peer, message, inputs, tensors.get("order"))
        chunk = max(1, PREFILL_CHUNK // len(inputs.hidden))
        return append(span, inputs, cache, chunk, each=message.each)

    def _session(self, peer: PeerId, message: Forward, inputs: Inputs, order: torch.Tensor | None) -> KVCache:
        """The session's cache, brought to where the step begins."""
        check_length(self._span, inputs, message.position)
        batch, count = inputs.hidden.shape[:2]
        key = peer, message.session
        kept = self._sessions.get(key)
        if kept is None or (kept.cache.start, kept.cache.end) != (message.start, message.end):
            if message.position:
                raise Unserved("lost", "this peer does not know the session")
            kept = self._open(key, message, batch)
        cache = kept.cache
        if message.position > cache.length:
            raise Unserved("lost", f"this peer knows {cache.length} positions of the session")
        kept.used_at = time.monotonic()
        cache.truncate(message.position)
        if order is not None:
            if order.is_floating_point() or order.shape != (batch,) or cache.length == 0:
                raise BadInputs("an order names a row of the batch before for each row of the batch now")
            if not 0 <= int(order.min()) <= int(order.max()) < (cache.batch or 0):
                raise BadInputs(f"an order names rows of a batch of {cache.batch}")
            self._reserve(key, message.start, message.end, batch, cache.capacity)
            cache.pick(order.long())
        elif cache.length == 0 and cache.batch != batch:
            kept = self._open(key, message, batch)
            cache = kept.cache
        cache.check_room(batch, count)
        return cache

    def _open(self, key: tuple[PeerId, str], message: Forward, batch: int) -> _Session:
        self._reserve(key, message.start, message.end, batch, message.room)
        kept = _Session(self._span.new_cache(message.start, message.end, message.room))
        self._sessions[key] = kept
        return kept

    def _reserve(self, key: tuple[PeerId, str], start: int, end: int, batch: int, room: int) -> None:
        size = self._span.kv_bytes_per_token(start, end) * room * batch
        try:
            self._budget.reserve(_held(*key), size)
        except Busy as busy:
            raise Unserved("busy", str(busy)) from None

    async def _one_piece(self, pieces: Pieces, budget: Budget, *, step: bool) -> bool:
        """Compute the next piece when no chat minds. False when there was none left."""
        await self._batcher.rested()
        if not step:
            await self._courtesy.patience()
        budget.ms = self._courtesy.piece_ms
        self._courtesy.began()
        try:
            return await self.executor.run(pieces.compute_one)
        finally:
            self._courtesy.ended()

    def _refuse(self, channel: Channel, request: int, code: Code, message: str) -> None:
        retry_after_s = RETRY_S if code == "busy" else 0.0
        with contextlib.suppress(RuntimeError):
            self._reply(channel, Refusal(request, code, message[:900], retry_after_s), b"", lambda: None)


def _width(message: Forward | Backward) -> torch.dtype:
    """The format of the hidden states that came, in which they go back."""
    return next(FROM_WIRE[part.tensor.dtype] for part in message.parts if part.name == "hidden")


def _written(result: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[list[Part], bytes]:
    """In the format in which the hidden states came; gradients of an adapter as they are."""
    return pack({name: t.to(dtype) if name.startswith("hidden") else t for name, t in result.items()})


def _held(peer: PeerId, name: str) -> str:
    """Under which name an asker's memory is counted."""
    return f"{peer}/{name}"
