"""Answer the messages that come to a peer: admit sessions, feed them, end them, hand out the tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Literal, Self, assert_never

import msgspec

from peer.model.constraint import Constraint, Grammars
from peer.model.extras import Adapter
from peer.model.span import Span
from peer.serving.batcher import Batcher
from peer.serving.compute import row_bytes
from peer.serving.courtesy import Courtesy
from peer.serving.executor import Executor
from peer.serving.hop_session import Admission, Arrival, HopSession, Inputs, scope
from peer.serving.kv_budget import KvBudget
from peer.serving.prefixes import Beginning, Prefixes
from peer.serving.training import Training
from peer.serving.turnover import Tenant, room_after_s
from shared.background import Background
from shared.channel import Channel, Priority
from shared.errors import Busy, ConnectionLost, ProtocolError
from shared.identity import PeerId, short
from shared.protocol import (
    Backward,
    Close,
    Consumed,
    Decline,
    Failed,
    Fetch,
    Files,
    Forward,
    Grant,
    Lend,
    Load,
    Locate,
    Lost,
    Open,
    Opened,
    Outputs,
    Path,
    PeerMessage,
    Probe,
    Refusal,
    Renew,
    RouteSpan,
    Scored,
    Step,
    Tee,
    Token,
)
from shared.tokenizer_files import pack_files

log = logging.getLogger(__name__)

LEASE_S = 30.0
"""A session whose asker is silent this long is closed; askers renew three times within it."""
SWEEPS_PER_LEASE = 10
MAX_REPLIES = 256
"""Refusals and files on their way out. Beyond these more are dropped: whoever asks without reading waits."""
SMOOTHING = 0.1
"""Weight of the newest step in the measured time per layer."""


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What this peer serves, besides its span."""

    artefact: str
    context_length: int
    tokenizer_files: Mapping[str, bytes]
    max_sessions: int = 256
    adapters: Mapping[str, Adapter] = {}
    """Those that it hosts for everyone, by id."""


class Service:
    """The serving side of a peer. `async with` it; give every message of every channel to `handle`.

    `dial` gives the channel to another peer of a route.
    """

    def __init__(
        self,
        me: PeerId,
        span: Span,
        offer: Offer,
        budget: KvBudget,
        dial: Callable[[PeerId], Awaitable[Channel]],
        *,
        lease_s: float = LEASE_S,
    ) -> None:
        self.me = me
        self.span = span
        self.executor = Executor()
        self.batcher = Batcher(span, self.executor)
        self._hosted = {name: span.prepare(span.adapter_part(one)) for name, one in offer.adapters.items()}
        courtesy = Courtesy(self._most_hops)
        self.training = Training(
            span, offer.artefact, budget, self.batcher, courtesy, self._send_result, self._hosted
        )
        self.prefixes = Prefixes()
        self.draining = False
        """True once this peer leaves: see `drain`."""
        self.ms_per_layer: float | None = None
        """One decode step through one layer, with all that was in its pass, smoothed over the last steps."""
        self.dropped_replies = 0
        """Answers that were not sent, since too many others wait for participants that do not read."""
        self._replies = 0
        self._offer = offer
        self._budget = budget
        self._dial = dial
        self._grammars = Grammars(offer.tokenizer_files, span.vocab_size)
        self._lease_s = lease_s
        self._admitted: dict[str, _Admitted] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks = Background()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.executor)
        await self._stack.enter_async_context(self.training.executor)
        await self._stack.enter_async_context(self._tasks)
        self._tasks.start(self.batcher.run())
        self._tasks.start(self.training.run())
        self._stack.callback(self.training.end)
        self._tasks.start(self._sweep())
        self._stack.callback(self._end_all)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    @property
    def session_count(self) -> int:
        """Sessions of which this is a hop; those that it stands by for do not count."""
        return len(self._admitted) - len(self._standbys())

    @property
    def standby_count(self) -> int:
        """Sessions that it stands by for."""
        return len(self._standbys())

    @property
    def kv_tokens_free(self) -> int:
        """Positions through the whole span that a session would find room for."""
        return self._free_bytes // self._bytes_per_token(self.span.start, self.span.end)

    @property
    def _free_bytes(self) -> int:
        """What nobody holds, and what standbys would give back."""
        return self._budget.free_bytes + sum(self._budget.held_bytes(name) for name in self._standbys())

    def _standbys(self) -> list[str]:
        return [name for name, admitted in self._admitted.items() if admitted.standby]

    def drain(self) -> None:
        """Take no new sessions, and stand by for none."""
        self.draining = True
        for session in self._standbys():
            self._dismiss(session)

    @property
    def wait_ms(self) -> float:
        """What a step of one position waits before it is computed."""
        return self.batcher.wait_ms if self.session_count else 0.0

    async def drained(self) -> None:
        """Returns when no session is left, and none that it stands by for."""
        await self._empty.wait()

    def channel_closed(self, channel: Channel) -> None:
        """Askers whose ring passed through that channel learn of it at once."""
        self.training.forget(channel.peer)
        for admitted in self._admitted.values():
            if admitted.session.uses(channel):
                admitted.session.stir()
                opened = admitted.session.newest
                lost = Lost(opened.session, opened.epoch, channel.peer)
                self._tasks.start(admitted.session.tell(lost))

    # ------------------------------------------------------------ what sessions need of us

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._tasks.start(coroutine)

    async def channel(self, peer: PeerId) -> Channel:
        return await self._dial(peer)

    async def constraint(self, opened: Open) -> Constraint | None:
        if not opened.sampling.grammar or opened.index != len(opened.route) - 1:
            return None
        grammar, stop_tokens = opened.sampling.grammar, opened.stop_tokens
        return await asyncio.to_thread(self._grammars.constraint, grammar, stop_tokens)

    def hosted(self, adapter: str) -> Adapter | None:
        """An adapter by its id, which was checked before; None for the empty one."""
        return self._hosted[adapter] if adapter else None

    def stepped(self, layers: int, count: int, computed_ms: float) -> None:
        if count != 1:
            return
        per_layer = computed_ms / layers
        before = self.ms_per_layer if self.ms_per_layer is not None else per_layer
        self.ms_per_layer = before + SMOOTHING * (per_layer - before)

    # ------------------------------------------------------------ messages

    def handle(self, channel: Channel, message: PeerMessage, body: bytes | memoryview, path: Path) -> None:
        """Take one message. Raises ProtocolError for one that no honest participant sends us."""
        arrived = time.perf_counter()
        match message:
            case Open():
                self._open(channel, message)
            case Step():
                self._step(channel, Inputs(message, body, path, arrived, _link_ms(channel), channel))
            case Consumed(session=session):
                if admitted := self._admitted.get(session):
                    admitted.session.consumed(channel.peer, message)
            case Token():
                self._token(channel, Arrival(message, path, arrived, _link_ms(channel)))
            case Grant() | Tee():
                if admitted := self._from_asker(channel, message.session):
                    admitted.session.put(message)
            case Locate(session=session):
                if admitted := self._from_asker(channel, session):
                    here = admitted.session
                    self._reply(channel, Consumed(session, here.open.epoch, here.position))
            case Renew(sessions=sessions):
                for session in sessions:
                    self._from_asker(channel, session)
                    self.training.renew(channel.peer, session)
            case Close(session=session, pages=pages):
                self.training.close(channel.peer, session)
                if self._from_asker(channel, session):
                    self._end(session, pages)
            case Lost(session=session):
                # A later hop does not know the session; only the asker can mend that.
                admitted = self._admitted.get(session)
                if admitted and message.peer == channel.peer and admitted.session.visits(channel.peer):
                    self._tasks.start(admitted.session.tell(message))
                    admitted.session.lost(channel.peer)
            case Probe():
                self._reply(channel, self._load(message))
            case Fetch():
                self._hand_out(channel, message)
            case Forward() | Backward():
                self.training.handle(channel, message, body, draining=self.draining)
            case Lend():
                self._tasks.start(self.training.lend(channel, message, body))
            case Opened() | Decline() | Scored() | Failed() | Load() | Files() | Outputs() | Refusal():
                raise ProtocolError(f"a {type(message).__name__} is for askers, and I asked for nothing")
            case _:
                assert_never(message)

    def _step(self, channel: Channel, inputs: Inputs) -> None:
        admitted = self._admitted.get(inputs.step.session)
        if admitted is None:
            self._reply(channel, Lost(inputs.step.session, inputs.step.epoch, self.me))
        elif channel.peer == admitted.sources.get(inputs.step.epoch):
            admitted.session.put(inputs)

    def _token(self, channel: Channel, arrival: Arrival) -> None:
        admitted = self._admitted.get(arrival.token.session)
        if admitted is not None and channel.peer == admitted.session.open.route[-1].peer:
            admitted.session.put(arrival)

    def _hand_out(self, channel: Channel, fetch: Fetch) -> None:
        if fetch.artefact != self._offer.artefact:
            raise ProtocolError("I do not serve the artefact whose tokenizer was asked for")
        files, body = pack_files(fetch.request, self._offer.tokenizer_files)
        self._reply(channel, files, body, Priority.PREFILL)

    def _reply(
        self,
        channel: Channel,
        message: PeerMessage,
        body: bytes = b"",
        priority: Priority = Priority.CONTROL,
    ) -> None:
        """Answer without waiting: a handler that waits for room would stop all that comes by the channel."""
        if self._replies >= MAX_REPLIES:
            self.dropped_replies += 1
            return
        self._replies += 1
        self._tasks.start(self._send_reply(channel, message, body, priority))

    async def _send_reply(
        self, channel: Channel, message: PeerMessage, body: bytes, priority: Priority
    ) -> None:
        try:
            with contextlib.suppress(ConnectionLost):
                await channel.send(message, body, priority)
        finally:
            self._replies -= 1

    def _most_hops(self) -> int:
        """Of the routes that lead through here."""
        return max((len(admitted.session.open.route) for admitted in self._admitted.values()), default=1)

    def _send_result(
        self, channel: Channel, message: PeerMessage, body: bytes, sent: Callable[[], None]
    ) -> None:
        task = self._tasks.start(self._send_whole(channel, message, body))
        task.add_done_callback(lambda _: sent())

    async def _send_whole(self, channel: Channel, message: PeerMessage, body: bytes) -> None:
        with contextlib.suppress(ConnectionLost):
            await channel.send(message, body, Priority.PREFILL if body else Priority.CONTROL)

    # ------------------------------------------------------------ admission

    def _load(self, probe: Probe) -> Load:
        token_bytes = self._bytes_per_token(self.span.start, self.span.end)
        closed = self.draining or self.session_count >= self._offer.max_sessions
        free = 0 if closed else self._free_bytes // token_bytes
        return Load(
            request=probe.request,
            sessions=self.session_count,
            wait_ms=self.wait_ms,
            ms_per_layer=self.ms_per_layer,
            kv_tokens_free=free,
            kv_tokens=self._budget.total_bytes // token_bytes,
            retry_after_s=self._room_after_s(probe.tokens * token_bytes) if free < probe.tokens else 0.0,
        )

    def _room_after_s(self, wanted_bytes: int) -> float:
        """When a session that does not fit now may come again."""
        now = time.monotonic()
        tenants = [
            Tenant(
                held_bytes=self._budget.held_bytes(name),
                drawn=max(0, admitted.session.position - admitted.session.open.prompt_length),
                left=admitted.session.open.max_tokens - admitted.session.position,
                age_s=now - admitted.since,
            )
            for name, admitted in self._admitted.items()
            if not admitted.standby
        ]
        return room_after_s(tenants, wanted_bytes - self._free_bytes)

    def _open(self, channel: Channel, opened: Open) -> None:
        admitted = self._admitted.get(opened.session)
        if admitted is not None and opened.epoch <= admitted.session.newest.epoch:
            return
        refusal = self._refusal(channel, opened) or self._reserve(opened)
        if refusal is not None:
            self._reply(channel, refusal)
            return
        beginning = self._beginning(channel, opened)
        if admitted is None:
            admitted = self._admit(channel, opened)
        admitted.standby = opened.standby
        admitted.session.asker = channel
        admitted.session.renew(opened)
        admitted.feed(
            opened.epoch, PeerId(opened.route[opened.index - 1].peer) if opened.index else channel.peer
        )
        admitted.deadline = time.monotonic() + self._lease_s
        admitted.session.put(Admission(opened, beginning))

    def _refusal(self, channel: Channel, opened: Open) -> Decline | None:
        admitted = self._admitted.get(opened.session)
        mine = _entry(opened, self.me)
        if mine is None or (admitted is not None and admitted.session.asker.peer != channel.peer):
            return _decline(
                opened, "invalid", "the route does not name this peer, or the session is not yours"
            )
        if opened.artefact != self._offer.artefact:
            return _decline(opened, "artefact", "this peer serves other weights")
        if not _covers(opened.route, self.span.layer_count):
            return _decline(
                opened, "invalid", f"the route does not lead once through all {self.span.layer_count} layers"
            )
        if max(opened.history, default=0) >= self.span.vocab_size:
            return _decline(
                opened, "invalid", f"the history leaves this model's vocabulary of {self.span.vocab_size}"
            )
        # A cache keeps the capacity it was made with, so a smaller reservation would lend memory uncounted.
        if admitted is not None and admitted.session.open.max_tokens != opened.max_tokens:
            return _decline(opened, "invalid", "a session keeps the max_tokens that it was opened with")
        if not self.span.start <= mine.start < mine.end <= self.span.end:
            return _decline(opened, "layers", f"this peer serves layers {self.span.start}–{self.span.end}")
        if opened.adapter and opened.adapter not in self._hosted:
            return _decline(opened, "layers", "this peer does not host that adapter")
        if admitted is not None and admitted.session.open.adapter != opened.adapter:
            return _decline(opened, "invalid", "a session keeps the adapter that it was opened with")
        if opened.max_tokens > self._offer.context_length:
            return _decline(
                opened,
                "context",
                f"the model holds {self._offer.context_length} tokens, not {opened.max_tokens}",
            )
        if self.draining and (admitted is None or opened.standby):
            return _decline(opened, "draining", "this peer is leaving")
        if admitted is None and self.session_count >= self._offer.max_sessions:
            message = f"this peer has {self.session_count} sessions already"
            return _decline(opened, "busy", message, self._room_after_s(0))
        return None

    def _reserve(self, opened: Open) -> Decline | None:
        mine = opened.route[opened.index]
        token_bytes = self._bytes_per_token(mine.start, mine.end)
        if not opened.standby:
            self._make_room(opened, opened.max_tokens * token_bytes)
        try:
            self._budget.reserve(opened.session, opened.max_tokens * token_bytes)
        except Busy as busy:
            fitting = self._budget.free_bytes // token_bytes
            message = f"{busy}: {fitting} tokens would fit, not {opened.max_tokens}"
            retry_after_s = self._room_after_s(opened.max_tokens * token_bytes)
            return _decline(opened, "busy", message, retry_after_s)
        return None

    def _make_room(self, opened: Open, wanted_bytes: int) -> None:
        """Send standbys away, the newest first, if that makes room for a session."""
        wanted_bytes -= self._budget.held_bytes(opened.session)
        if wanted_bytes > self._free_bytes:
            return
        for session in reversed(self._standbys()):
            if wanted_bytes <= self._budget.free_bytes:
                return
            if session != opened.session:
                self._dismiss(session)

    def _dismiss(self, session: str) -> None:
        """Stand by for a session no longer; its asker finds another."""
        standby = self._admitted[session].session
        lost = Lost(session, standby.newest.epoch, self.me)
        self._tasks.start(standby.tell(lost))
        self._end(session)

    def _beginning(self, channel: Channel, opened: Open) -> Beginning | None:
        """What another session left, or lends, for this one; what was left makes room for reservations."""
        admitted = self._admitted.get(opened.session)
        pages = opened.pages if admitted is None or admitted.moves(opened) else []
        lent = [
            prefix
            for name, other in self._admitted.items()
            if pages and name != opened.session and (prefix := other.session.lend()) is not None
        ]
        return self.prefixes.begin(scope(channel.peer, opened), pages, self._budget.free_bytes, lent)

    def _bytes_per_token(self, start: int, end: int) -> int:
        """KV cache, and the input log where there is a next hop."""
        log_bytes = row_bytes(self.span) if end < self.span.layer_count else 0
        return self.span.kv_bytes_per_token(start, end) + log_bytes

    def _admit(self, channel: Channel, opened: Open) -> _Admitted:
        session = HopSession(opened, channel, self)
        task = self._tasks.start(session.run())
        admitted = self._admitted[opened.session] = _Admitted(session, task)
        self._empty.clear()
        log.debug("session %s of %s opened", opened.session[:8], short(channel.peer))
        return admitted

    def _from_asker(self, channel: Channel, session: str) -> _Admitted | None:
        """The session, if it is this channel's to command; being asked about renews its lease."""
        admitted = self._admitted.get(session)
        if admitted is None or admitted.session.asker.peer != channel.peer:
            return None
        admitted.session.asker = channel
        admitted.deadline = time.monotonic() + self._lease_s
        return admitted

    # ------------------------------------------------------------ endings

    def _end(self, session: str, pages: Sequence[str] = ()) -> None:
        admitted = self._admitted.pop(session)
        admitted.task.cancel()
        left = admitted.session.leave(admitted.session.asker.peer, pages)
        admitted.session.end()
        self._budget.release(session)
        if left is not None:
            self.prefixes.keep(left, self._budget.free_bytes)
        if not self._admitted:
            self._empty.set()

    def _end_all(self) -> None:
        for session in list(self._admitted):
            self._end(session)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / SWEEPS_PER_LEASE)
            self.training.sweep()
            now = time.monotonic()
            for session in [name for name, admitted in self._admitted.items() if admitted.deadline < now]:
                log.info("session %s fell silent and is closed", session[:8])
                self._end(session)


class _Admitted:
    """A session and what the service must know to serve it."""

    def __init__(self, session: HopSession, task: asyncio.Task[None]) -> None:
        self.session = session
        self.task = task
        self.since = time.monotonic()
        self.standby = False
        """Whether it only stands by, and gives way to sessions."""
        self.sources: dict[int, PeerId] = {}
        """Who may send it steps, by epoch: of the route that it serves, and of the one that is coming."""
        self.deadline = 0.0

    def feed(self, epoch: int, source: PeerId) -> None:
        """From that epoch on, steps come from there."""
        kept = [old for old in self.sources if old >= self.session.open.epoch]
        self.sources = {old: self.sources[old] for old in kept} | {epoch: source}

    def moves(self, opened: Open) -> bool:
        """True when a route gives it other layers, so that what it holds is of no use there."""
        before = self.session.newest
        was, now = before.route[before.index], opened.route[opened.index]
        return (was.start, was.end) != (now.start, now.end)


def _link_ms(channel: Channel) -> float | None:
    """One way through the channel, taken as half of its round trip."""
    return None if channel.rtt_ms is None else round(channel.rtt_ms / 2, 3)


def _entry(opened: Open, me: PeerId) -> RouteSpan | None:
    if opened.index >= len(opened.route) or opened.route[opened.index].peer != me:
        return None
    return opened.route[opened.index]


def _covers(route: Sequence[RouteSpan], layer_count: int) -> bool:
    """True when the entries follow one another from the first layer to the last."""
    reached = 0
    for entry in route:
        if entry.start != reached or entry.end <= entry.start:
            return False
        reached = entry.end
    return reached == layer_count


def _decline(
    opened: Open,
    code: Literal["busy", "artefact", "layers", "context", "draining", "invalid"],
    message: str,
    retry_after_s: float = 0.0,
) -> Decline:
    return Decline(opened.session, opened.epoch, code, message, retry_after_s)
