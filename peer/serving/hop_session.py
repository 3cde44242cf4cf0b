"""One session's part on this peer: its KV cache, its input log, and its place in the ring.

Everything that happens to a session is an item of its inbox, handled in order by one task, so that a new
epoch never meets a half-finished step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol, assert_never

import msgspec

from peer.model.errors import BadInputs
from peer.model.kv_cache import KVCache
from peer.model.span import Span
from peer.serving.batcher import Batcher
from peer.serving.compute import Computed, Draw, row_bytes, wire_dtype
from peer.serving.executor import Executor
from peer.serving.input_log import InputLog
from peer.serving.prefixes import Beginning, Prefix
from shared.channel import Channel, Priority
from shared.errors import ConnectionLost, CorollaError
from shared.identity import PeerId
from shared.protocol import (
    PREFILL_CHUNK,
    PREFILL_WINDOW,
    Consumed,
    Failed,
    Grant,
    Hop,
    Lost,
    Open,
    Opened,
    Path,
    PeerMessage,
    RouteSpan,
    Step,
    Tensor,
    Token,
)
from shared.tensors import tensor_bytes

log = logging.getLogger(__name__)

INBOX_SIZE = 64
"""Items waiting for one session. Those who keep to the window send far fewer; one more ends the session:
to wait would hold up everything else that comes by the same channel."""


class Admission(msgspec.Struct, frozen=True):
    """A route that the session takes, and what an earlier session left for its beginning."""

    opened: Open
    beginning: Beginning | None = None


class Inputs(msgspec.Struct, frozen=True):
    """A step as it came in, with its tensor."""

    step: Step
    body: bytes | memoryview
    path: Path
    arrived: float
    link_ms: float | None = None
    source: Channel | None = None
    """Who fed it; None for a round of the ring that begins here."""


class Arrival(msgspec.Struct, frozen=True):
    """The token that ends a round of the ring, as it came to the first hop."""

    token: Token
    path: Path
    arrived: float
    link_ms: float | None = None


class Overrun(msgspec.Struct, frozen=True):
    """The inbox was full, and is empty now."""


Item = Admission | Inputs | Arrival | Grant | Overrun


class Surroundings(Protocol):
    """What a session needs of its peer."""

    me: PeerId
    span: Span
    executor: Executor
    batcher: Batcher

    async def channel(self, peer: PeerId) -> Channel: ...

    def stepped(self, layers: int, count: int, computed_ms: float) -> None:
        """A step of `count` positions through `layers` layers took this long."""


class HopSession:
    """Feed it items; it computes, passes on, and tells its asker."""

    def __init__(self, opened: Open, asker: Channel, around: Surroundings) -> None:
        self.open = opened
        self.asker = asker
        self.epoch = opened.epoch
        """The newest epoch heard of, which may be ahead of the one that the inbox has reached."""
        self._around = around
        self._cache: KVCache | None = None
        self._log = InputLog(row_bytes(around.span))
        self._fed_by: Sequence[RouteSpan] | None = None
        """The hops before this one, when all that the cache holds came from them."""
        self._history: list[int] = []
        self._held: Arrival | None = None
        self._credit = 0
        self._next_caught_up = False
        self._prompt_before = False
        """The step before this one was part of a prompt or replay that goes on."""
        self._allowed: int | None = None
        """Up to which position the next hop may be sent steps of a prompt; None before the first one."""
        self._stirred = asyncio.Event()
        self._over = False
        self._inbox: asyncio.Queue[Item] = asyncio.Queue(INBOX_SIZE)
        self._watches = ExitStack()
        self._channels: dict[PeerId, Channel] = {}

    @property
    def mine(self) -> RouteSpan:
        """This peer's entry of the route."""
        return self.open.route[self.open.index]

    @property
    def position(self) -> int:
        """Positions in the KV cache."""
        return self._cache.length if self._cache is not None else 0

    def leave(self, asker: PeerId, pages: Sequence[str]) -> Prefix | None:
        """What this session computed, under the names of its pages; None when it is not to be used again."""
        if self._over or self._cache is None or self._fed_by is None:
            return None
        length = self._cache.length if self._next() is None else min(self._cache.length, len(self._log))
        return Prefix(scope(asker, self.open), pages, length, self._cache, self._log)

    def put(self, item: Item) -> None:
        """Hand the session an item. A session that is over takes none."""
        if self._over:
            return
        if self._inbox.full():
            self.end()
            item = Overrun()
        self._inbox.put_nowait(item)

    def renew(self, epoch: int) -> None:
        """A newer epoch is on its way through the inbox: what still belongs to the one before may be left."""
        self.epoch = epoch
        self.stir()

    def consumed(self, peer: PeerId, told: Consumed) -> None:
        """The next hop has done steps of a prompt, so it can be sent more."""
        following = self._next()
        if following is None or following.peer != peer or told.epoch != self.open.epoch:
            return
        if self._allowed is not None:
            self._allowed = max(self._allowed, told.position + PREFILL_WINDOW)
            self.stir()

    def stir(self) -> None:
        """Something happened that a session waiting for its next hop should look at."""
        self._stirred.set()

    def end(self) -> None:
        """No more items."""
        self._over = True
        while not self._inbox.empty():
            self._inbox.get_nowait()

    def visits(self, peer: PeerId) -> bool:
        """True when the route leads through that peer."""
        return any(entry.peer == peer for entry in self.open.route)

    def uses(self, channel: Channel) -> bool:
        """True when the ring passes from this hop through that channel."""
        return self._channels.get(channel.peer) is channel

    async def run(self) -> None:
        """Handle items until cancelled. An error of ours ends the session with one sentence to the asker."""
        with self._watches:
            try:
                while True:
                    await self._handle(await self._inbox.get())
            except CorollaError as error:
                await self._fail(str(error)[:900])
            except Exception:
                # One session's mishap is no reason to drop the others; the asker gets no details of ours.
                log.exception("session %s failed", self.open.session[:8])
                await self._fail("an unexpected error, see this peer's log")

    async def _fail(self, message: str) -> None:
        self.end()
        await self.tell(Failed(self.open.session, self.open.epoch, message))

    async def _handle(self, item: Item) -> None:
        match item:
            case Admission():
                await self._take_route(item)
            case Inputs():
                await self._step(item)
            case Arrival():
                self._held = item
                await self._advance()
            case Grant():
                self._credit = max(self._credit, item.credit)
                await self._advance()
            case Overrun():
                raise BadInputs("more steps came than this peer had said it would take")
            case _:
                assert_never(item)

    # ------------------------------------------------------------ routes

    async def _take_route(self, admission: Admission) -> None:
        opened = admission.opened
        before, self.open = self.mine, opened
        moved = (before.start, before.end) != (self.mine.start, self.mine.end)
        self._credit = opened.credit
        self._held = None
        self._history = list(opened.history)
        self._next_caught_up = False
        self._allowed = None
        self._prompt_before = False
        fed_by = _as_fresh(opened.route[: opened.index])
        if self._cache is None or moved or self.mine.fresh:
            self._fed_by = fed_by
            await self._begin(admission.beginning)
        elif self._fed_by != fed_by:
            self._fed_by = None
        await self.tell(Opened(opened.session, opened.epoch, self.position))

    async def _begin(self, beginning: Beginning | None) -> None:
        """An empty cache, or one that begins with what an earlier session left."""
        capacity = self.open.max_tokens
        if beginning is not None:
            self._cache, self._log = await self._around.executor.run(beginning.take, capacity)
            return
        self._cache = self._around.span.new_cache(self.mine.start, self.mine.end, capacity)
        self._log = InputLog(row_bytes(self._around.span))

    def _next(self) -> RouteSpan | None:
        after = self.open.index + 1
        return self.open.route[after] if after < len(self.open.route) else None

    # ------------------------------------------------------------ steps

    async def _step(self, inputs: Inputs) -> None:
        step = inputs.step
        if step.epoch != self.open.epoch or self._cache is None:
            return
        if step.position > self._cache.length:
            # Our memory of the session is not what the asker believes: ask for a replay, as if we were new.
            await self._report_lost(self._around.me)
            return
        # With ours added they might be more than a message holds, and the next hop would hang up on us.
        if len(step.hops) > self.open.index:
            raise BadInputs(f"a step came with {len(step.hops)} hops, from only {self.open.index} before me")
        if step.count > PREFILL_WINDOW:
            raise BadInputs(f"a step brings at most {PREFILL_WINDOW} positions, not {step.count}")
        for piece in self._cut(inputs):
            await self._compute(piece)
        if self.epoch == step.epoch:
            await self._ask_for_more(inputs)

    def _cut(self, inputs: Inputs) -> Iterator[Inputs]:
        """A long step in pieces, so that the next hop computes one while this one computes the next."""
        step, pace = inputs.step, self._around.batcher.pace
        whole = self._next() is None or len(inputs.body) != tensor_bytes(step.tensor)
        start, row = 0, len(inputs.body) // step.count
        while start < step.count:
            end = step.count if whole else min(start + pace.piece, step.count)
            if step.count - end == 1:
                end = step.count  # alone it would travel in the lane of tokens, and overtake the others
            piece = msgspec.structs.replace(
                step,
                position=step.position + start,
                count=end - start,
                tensor=Tensor(step.tensor.dtype, [end - start, *step.tensor.shape[1:]]),
                sample=step.sample and end == step.count,
            )
            body = inputs.body[start * row : end * row]
            yield (
                inputs
                if end - start == step.count
                else msgspec.structs.replace(inputs, step=piece, body=body)
            )
            start = end

    async def _compute(self, inputs: Inputs) -> None:
        step = inputs.step
        assert self._cache is not None
        draw = self._draw(step) if self._next() is None and step.sample else None
        computed = await self._around.batcher.compute(self._cache, step, inputs.body, draw)
        self._around.stepped(self.mine.end - self.mine.start, step.count, computed.computed_ms)
        if self._next() is not None:
            self._log.write(step.position, computed.body)
        if self.epoch == step.epoch:
            await self._pass_on(inputs, computed)

    async def _ask_for_more(self, inputs: Inputs) -> None:
        """Whoever feeds us a prompt, or replays one, keeps to what we have told to be done."""
        step = inputs.step
        if inputs.source is not None and (step.replay or step.count > 1):
            done = Consumed(step.session, step.epoch, step.position + step.count)
            with contextlib.suppress(ConnectionLost):
                await inputs.source.send(done, b"", Priority.CONTROL)

    def _draw(self, step: Step) -> Draw:
        position = step.position + step.count
        del self._history[position:]
        return Draw(self.open.sampling, self._history, self.open.prompt_length)

    async def _pass_on(self, inputs: Inputs, computed: Computed) -> None:
        step, following = inputs.step, self._next()
        hop = Hop(
            peer=self._around.me,
            start=self.mine.start,
            end=self.mine.end,
            waited_ms=round(max(0.0, (computed.ended - inputs.arrived) * 1000 - computed.computed_ms), 3),
            computed_ms=round(computed.computed_ms, 3),
            path=inputs.path,
            link_ms=inputs.link_ms,
        )
        if following is None:
            if computed.token is not None:
                await self._close_round(step, computed.token, [*step.hops, hop])
            return
        if step.replay and not following.fresh:
            return
        assert computed.tensor is not None
        onward = msgspec.structs.replace(step, tensor=computed.tensor, hops=[*step.hops, hop])
        catching_up = not step.replay and not self._next_caught_up and following.fresh and not self.mine.fresh
        if catching_up:
            await self._replay(following, step.position)
        self._next_caught_up = self._next_caught_up or not step.replay
        # Behind a replay or a prompt its last step must not overtake the rest, so it takes the same lane.
        urgent = step.count == 1 and step.sample and not catching_up and not self._prompt_before
        self._prompt_before = not step.sample
        if urgent or await self._may_send(onward):
            await self._send(following, onward, computed.body, urgent=urgent)

    async def _replay(self, following: RouteSpan, end: int) -> None:
        """Give a fresh hop everything that the lost one had seen."""
        for start in range(0, end, PREFILL_CHUNK):
            count = min(PREFILL_CHUNK, end - start)
            step = Step(
                session=self.open.session,
                epoch=self.open.epoch,
                position=start,
                count=count,
                tensor=Tensor(wire_dtype(self._around.span), [count, self._around.span.hidden_size]),
                replay=True,
            )
            if not await self._may_send(step):
                return
            await self._send(following, step, self._log.read(start, start + count), urgent=False)

    async def _may_send(self, step: Step) -> bool:
        """Wait until the next hop takes this step of a prompt. False when a newer epoch began meanwhile."""
        if self._allowed is None:
            self._allowed = step.position + PREFILL_WINDOW
        while step.position + step.count > self._allowed:
            if self.epoch != step.epoch:
                return False
            self._stirred.clear()
            await self._stirred.wait()
        return True

    # ------------------------------------------------------------ the ring

    async def _close_round(self, step: Step, token_id: int, hops: list[Hop]) -> None:
        position = step.position + step.count
        if self.open.sampling.needs_history:
            self._history.append(token_id)
        token = Token(
            session=self.open.session,
            epoch=self.open.epoch,
            position=position,
            token=token_id,
            hops=hops,
            stop=token_id in self.open.stop_tokens,
        )
        # To the first hop before the asker: the ring goes on while the asker reads.
        if not token.stop:
            await self._send(self.open.route[0], msgspec.structs.replace(token, hops=[]), urgent=True)
        await self.tell(token)

    async def _advance(self) -> None:
        """At the first hop: start the next round, if a token is here and the asker granted one more."""
        held = self._held
        if held is None or held.token.epoch != self.open.epoch or held.token.position + 1 >= self._credit:
            return
        self._held = None
        step = Step(
            session=self.open.session,
            epoch=self.open.epoch,
            position=held.token.position,
            count=1,
            tensor=Tensor("int32", [1]),
            sample=True,
        )
        body = array("i", [held.token.token]).tobytes()
        await self._step(Inputs(step, body, held.path, held.arrived, held.link_ms))

    # ------------------------------------------------------------ sending

    async def _send(self, to: RouteSpan, message: Step | Token, body: bytes = b"", *, urgent: bool) -> None:
        peer = PeerId(to.peer)
        if peer == self._around.me and isinstance(message, Token):
            # A model on one peer: the ring closes on itself. The inbox has room, its task is here.
            self._inbox.put_nowait(Arrival(message, "local", time.perf_counter()))
            return
        try:
            channel = await self._channel(peer)
            await channel.send(message, body, Priority.DECODE if urgent else Priority.PREFILL)
        except ConnectionLost:
            await self._report_lost(peer)

    async def _channel(self, peer: PeerId) -> Channel:
        channel = self._channels.get(peer)
        if channel is None or channel.closed.is_set():
            channel = self._channels[peer] = await self._around.channel(peer)
            self._watches.enter_context(channel.watched())
        return channel

    async def _report_lost(self, peer: PeerId) -> None:
        await self.tell(Lost(self.open.session, self.open.epoch, peer))

    async def tell(self, message: PeerMessage) -> None:
        """To the asker. One that is gone hears nothing: the lease then ends the session."""
        with contextlib.suppress(ConnectionLost):
            await self.asker.send(message, b"", Priority.CONTROL)


def scope(asker: PeerId, opened: Open) -> Hashable:
    """Whose prefixes a session shares: of the same asker, computed by the same hops up to this one."""
    hops = opened.route[: opened.index + 1]
    return asker, tuple((entry.peer, entry.start, entry.end) for entry in hops)


def _as_fresh(route: Sequence[RouteSpan]) -> list[RouteSpan]:
    """Entries that are equal when peer and layers are."""
    return [RouteSpan(entry.peer, entry.start, entry.end) for entry in route]
