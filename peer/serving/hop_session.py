"""One session's part on this peer: its KV cache, its input log, and its place in the ring.

Everything that happens to a session is an item of its inbox, handled in order by one task, so that a new
epoch never meets a half-finished step.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sys
import time
from array import array
from collections.abc import Coroutine, Hashable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, assert_never

import msgspec

from peer.model.constraint import Constraint
from peer.model.errors import BadInputs
from peer.model.extras import Adapter
from peer.model.kv_cache import KVCache
from peer.model.span import Span
from peer.serving.batcher import Batcher
from peer.serving.compute import Computed, Draw, Score, row_bytes, wire_dtype
from peer.serving.executor import Executor
from peer.serving.input_log import InputLog
from peer.serving.prefixes import Beginning, Prefix
from peer.serving.tee import TeeRun, reach
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
    Likelihood,
    Lost,
    Open,
    Opened,
    Path,
    PeerMessage,
    RouteSpan,
    Scored,
    Step,
    Tee,
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


Item = Admission | Inputs | Arrival | Grant | Tee | Overrun


class Surroundings(Protocol):
    """What a session needs of its peer."""

    me: PeerId
    span: Span
    executor: Executor
    batcher: Batcher

    async def channel(self, peer: PeerId) -> Channel: ...

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the session; it ends with the peer at the latest."""

    async def constraint(self, opened: Open) -> Constraint | None:
        """What may be drawn here in this session; None for anything. Raises BadGrammar."""

    def hosted(self, adapter: str) -> Adapter | None: ...

    def stepped(self, layers: int, count: int, computed_ms: float) -> None:
        """A step of `count` positions through `layers` layers took this long."""


class HopSession:
    """Feed it items; it computes, passes on, and tells its asker."""

    def __init__(self, opened: Open, asker: Channel, around: Surroundings) -> None:
        self.open = opened
        self.asker = asker
        self.newest = opened
        """The newest route heard of. It is taken with its first step; until then the one before goes on."""
        self.epoch = opened.epoch
        """The newest epoch of which a step came: what still belongs to one before is of no use."""
        self._around = around
        self._cache: KVCache | None = None
        self._log = InputLog(row_bytes(around.span))
        self._fed_by: Sequence[RouteSpan] | None = None
        """The hops before this one, when all that the cache holds came from them."""
        self._history: list[int] = []
        """What the asker told of the tokens so far, and what was drawn here since."""
        self._constraint: Constraint | None = None
        self._held: Arrival | None = None
        self._credit = 0
        self._prepared: Open | None = None
        """A route whose first step has not come yet."""
        self._next_holds: int | None = None
        """What the next hop holds, until it was brought to where we are."""
        self._untold: list[int] = []
        """What each hop holds, to be told with the first step that is passed on in this epoch."""
        self._tee: TeeRun | None = None
        self._teeing: asyncio.Task[None] | None = None
        self._prompt_before = False
        """The step before this one was part of a prompt or replay that goes on."""
        self._allowed: int | None = None
        """Up to which position the next hop may be sent steps of a prompt; None before the first one."""
        self._stirred = asyncio.Event()
        self._over = False
        self._inbox: asyncio.Queue[Item] = asyncio.Queue(INBOX_SIZE)
        self._unchanged = sys.maxsize
        """Up to which position the cache is what it was since the route was taken."""
        self._watches = ExitStack()
        self._channels: dict[PeerId, Channel] = {}

    @property
    def mine(self) -> RouteSpan:
        """This peer's entry of the route."""
        return self.open.route[self.open.index]

    @property
    def position(self) -> int:
        """Positions in the KV cache and, where there is a next hop, in the log."""
        if self._cache is None:
            return 0
        return self._cache.length if self._next() is None else min(self._cache.length, len(self._log))

    def leave(self, asker: PeerId, pages: Sequence[str]) -> Prefix | None:
        """What this session computed, under the names of its pages; None when it is not to be used again."""
        if self._over or self._cache is None or self._fed_by is None:
            return None
        return Prefix(scope(asker, self.open), pages, self.position, self._cache, self._log)

    def lend(self) -> Prefix | None:
        """What this session has computed so far of the text that it was opened with, for others to copy."""
        left = None if self.open.standby else self.leave(self.asker.peer, self.open.pages)
        return left and dataclasses.replace(left, unchanged=lambda: self._unchanged)

    def put(self, item: Item) -> None:
        """Hand the session an item. A session that is over takes none."""
        if self._over:
            return
        if self._inbox.full():
            self.end()
            item = Overrun()
        if isinstance(item, Inputs):
            self.epoch = max(self.epoch, item.step.epoch)
        self._inbox.put_nowait(item)

    def renew(self, opened: Open) -> None:
        """A newer route is on its way through the inbox; who waits for a hop of the one before need not."""
        self.newest = opened
        self.stir()

    def consumed(self, peer: PeerId, told: Consumed) -> None:
        """The next hop has done steps of a prompt, so it can be sent more."""
        following = self._next()
        if following is None or told.epoch != self.open.epoch:
            return
        if self._tee is not None and self._tee.peer == peer:
            self._tee.consumed(told.position)
        if following.peer != peer:
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
        self._end_tee()
        while not self._inbox.empty():
            self._inbox.get_nowait()

    def visits(self, peer: PeerId) -> bool:
        """True when the route leads through that peer, or when it stands by for our next hop."""
        return self._copies_to(peer) or any(entry.peer == peer for entry in self.newest.route)

    def _copies_to(self, peer: PeerId) -> bool:
        return self._tee is not None and self._tee.peer == peer

    def uses(self, channel: Channel) -> bool:
        """True when the ring, or copies for a standby, pass from this hop through that channel."""
        copies = self._tee is not None and self._tee.channel is channel
        return copies or self._channels.get(channel.peer) is channel

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
                await self._prepare(item)
            case Inputs():
                await self._step(item)
            case Arrival():
                self._held = item
                await self._advance()
            case Grant():
                self._credit = max(self._credit, item.credit)
                await self._advance()
            case Tee():
                self._start_tee(item)
            case Overrun():
                raise BadInputs("more steps came than this peer had said it would take")
            case _:
                assert_never(item)

    # ------------------------------------------------------------ routes

    async def _prepare(self, admission: Admission) -> None:
        """Ready for a route. What is under way on the one before goes on until the first step of this one."""
        opened = admission.opened
        if self._cache is None or not _same_layers(self.mine, opened.route[opened.index]):
            self._take_route(opened)
            self._fed_by = opened.route[: opened.index]
            await self._begin(admission.beginning)
        else:
            self._prepared = opened
        if self._constraint is None:
            self._constraint = await self._around.constraint(opened)
        if opened.standby:
            # Whom it will speak to as a hop: the next one, or the first one that it brings tokens to.
            following = (opened.route[opened.index + 1 :] or opened.route)[0]
            if following.peer != self._around.me:
                self._around.start(reach(self._around.channel, PeerId(following.peer)))
        await self.tell(Opened(opened.session, opened.epoch, self.position))

    def _take_route(self, opened: Open) -> None:
        self._end_tee()
        self.open, self._prepared = opened, None
        self._credit = max(self._credit, opened.credit)
        self._held = None
        self._history = list(opened.history)
        self._next_holds = None
        self._untold = []
        self._allowed = None
        self._prompt_before = False
        self._unchanged = sys.maxsize
        if self._fed_by != opened.route[: opened.index]:
            self._fed_by = None

    async def _begin(self, beginning: Beginning | None) -> None:
        """An empty cache, or one that begins with what an earlier session left."""
        capacity = self.open.max_tokens
        if beginning is not None:
            self._cache, self._log = await self._around.executor.run(beginning.take, capacity)
            return
        self._cache = self._around.span.new_cache(self.mine.start, self.mine.end, capacity)
        self._cache.adapter = self._around.hosted(self.open.adapter)
        self._log = InputLog(row_bytes(self._around.span))

    # ------------------------------------------------------------ standbys

    def _stands_by(self) -> bool:
        """True until a route is on its way on which this is a hop."""
        return self.open.standby and self.newest.standby

    def _start_tee(self, tee: Tee) -> None:
        if tee.epoch != self.open.epoch or self._next() is None or self.open.standby:
            return
        self._end_tee()
        self._tee = TeeRun(tee, self._log, wire_dtype(self._around.span), self._around.span.hidden_size)
        self._teeing = self._around.start(self._run_tee(self._tee))

    async def _run_tee(self, tee: TeeRun) -> None:
        try:
            await tee.run(self._around.channel)
        except ConnectionLost:
            await self._report_lost(tee.peer, self.open.epoch)

    def _end_tee(self) -> None:
        if self._teeing is not None:
            self._teeing.cancel()
        self._tee = self._teeing = None

    def lost(self, peer: PeerId) -> None:
        """A standby that we copy to does not know the session."""
        if self._copies_to(peer):
            self._end_tee()

    def _next(self) -> RouteSpan | None:
        after = self.open.index + 1
        return self.open.route[after] if after < len(self.open.route) else None

    # ------------------------------------------------------------ steps

    async def _step(self, inputs: Inputs) -> None:
        step = inputs.step
        if self._prepared is not None and step.epoch == self._prepared.epoch:
            self._take_route(self._prepared)
        if step.epoch != self.open.epoch or self._cache is None:
            return
        if step.position > self._cache.length:
            # Our memory of the session is not what the asker believes: ask for a replay, as if we were new.
            await self.tell(Lost(step.session, step.epoch, self._around.me))
            return
        if step.position < self._cache.length:
            self._unchanged = min(self._unchanged, step.position)
        # With ours added they might be more than a message holds, and the next hop would hang up on us.
        if len(step.hops) > self.open.index:
            raise BadInputs(f"a step came with {len(step.hops)} hops, from only {self.open.index} before me")
        if step.count > PREFILL_WINDOW:
            raise BadInputs(f"a step brings at most {PREFILL_WINDOW} positions, not {step.count}")
        if step.held and self._next() is not None:
            self._next_holds = _after(step.held, self.open.index)
            self._untold = step.held
        for piece in self._cut(inputs):
            await self._compute(piece)
            if self.newest.epoch != step.epoch and step.count > 1:
                self._leave(step.epoch)
                return
        if self.epoch == step.epoch:
            await self._ask_for_more(inputs)

    def _leave(self, epoch: int) -> None:
        """A long step was left half way for a newer route: nothing of its epoch goes on from here."""
        self.epoch = max(self.epoch, epoch + 1)

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
        last = self._next() is None and not self.open.standby
        draw = self._draw(step) if last and step.sample else None
        score = self._score(step) if last else None
        computed = await self._around.batcher.compute(
            self._cache, step, inputs.body, draw, self._stands_by, score
        )
        self._around.stepped(self.mine.end - self.mine.start, step.count, computed.computed_ms)
        if self._next() is not None:
            self._log.write(step.position, computed.body)
            if self._tee is not None:
                self._tee.written(step.position)
        if self.epoch == step.epoch and not self.open.standby:
            await self._pass_on(inputs, computed)

    async def _ask_for_more(self, inputs: Inputs) -> None:
        """Whoever feeds us a prompt, or replays one, keeps to what we have told to be done."""
        step = inputs.step
        if inputs.source is None or (step.count == 1 and step.sample):
            return
        done = Consumed(step.session, step.epoch, step.position + step.count)
        with contextlib.suppress(ConnectionLost):
            await inputs.source.send(done, b"", Priority.CONTROL)
        if self.open.standby and inputs.source.peer != self.asker.peer:
            await self.tell(done)

    def _draw(self, step: Step) -> Draw:
        sampling = self.open.sampling
        unknown = 0 if sampling.needs_prompt else self.open.prompt_length
        del self._history[max(0, step.position + step.count - unknown) :]
        return Draw(sampling, self._history, self.open.prompt_length - unknown, self._constraint)

    def _score(self, step: Step) -> Score | None:
        """The tokens of the prompt that the step's positions lead to, if the asker wants them scored."""
        sampling, prompt = self.open.sampling, self._history
        if not sampling.prompt_likelihoods or len(prompt) > self.open.prompt_length:
            return None  # behind the first token nobody waits for them
        following = prompt[step.position + 1 : step.position + 1 + step.count]
        return Score(following, sampling.likelihoods or 0) if following else None

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
            if computed.scores:
                await self.tell(Scored(step.session, step.epoch, step.position + 1, computed.scores))
            if computed.token is not None:
                await self._close_round(step, computed.token, computed.likelihood, [*step.hops, hop])
            return
        behind = await self._bring_up(following, step)
        skipped = max(0, (self._next_holds or 0) - step.position)
        if skipped >= step.count:
            return
        self._next_holds = None
        assert computed.tensor is not None
        onward = msgspec.structs.replace(
            step,
            position=step.position + skipped,
            count=step.count - skipped,
            tensor=Tensor(computed.tensor.dtype, [step.count - skipped, *computed.tensor.shape[1:]]),
            held=self._tell(),
            hops=[*step.hops, hop],
        )
        body = computed.body[skipped * row_bytes(self._around.span) :]
        # Behind a replay or a prompt its last step must not overtake the rest, so it takes the same lane.
        urgent = onward.count == 1 and step.sample and not behind and not self._prompt_before
        self._prompt_before = not step.sample
        await self._send_step(following, onward, body, urgent=urgent)

    async def _bring_up(self, following: RouteSpan, step: Step) -> bool:
        """Give a next hop that holds less than we do the rest of our log; True when there was something."""
        held = self._next_holds
        if held is None or held >= step.position:
            return False
        for start in range(held, step.position, PREFILL_CHUNK):
            count = min(PREFILL_CHUNK, step.position - start)
            replayed = Step(
                session=step.session,
                epoch=step.epoch,
                position=start,
                count=count,
                tensor=Tensor(wire_dtype(self._around.span), [count, self._around.span.hidden_size]),
                held=self._tell(),
            )
            await self._send_step(following, replayed, self._log.read(start, start + count), urgent=False)
        return True

    def _tell(self) -> list[int]:
        told, self._untold = self._untold, []
        return told

    async def _may_send(self, step: Step) -> bool:
        """Wait until the next hop takes this step of a prompt. False when a newer route came meanwhile."""
        if self._allowed is None:
            self._allowed = step.position + PREFILL_WINDOW
        while step.position + step.count > self._allowed:
            if self.newest.epoch != step.epoch:
                return False
            self._stirred.clear()
            await self._stirred.wait()
        return True

    # ------------------------------------------------------------ the ring

    async def _close_round(
        self, step: Step, token_id: int, likelihood: Likelihood | None, hops: list[Hop]
    ) -> None:
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
            likelihood=likelihood,
        )
        # To the first hop before the asker: the ring goes on while the asker reads.
        if not token.stop:
            onward = msgspec.structs.replace(token, hops=[], likelihood=None)
            await self._send(self.open.route[0], onward, urgent=True)
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

    async def _send_step(self, following: RouteSpan, step: Step, body: bytes, *, urgent: bool) -> None:
        if self.epoch != step.epoch:
            return
        if urgent:
            await self._send(following, step, body, urgent=True)
        elif not await self._may_send(step) or not await self._until_newer(
            self._send(following, step, body, urgent=False), step.epoch
        ):
            self._leave(step.epoch)

    async def _until_newer(self, sending: Coroutine[Any, Any, None], epoch: int) -> bool:
        """Send, and give up when a newer route is there: who does not take it may be who was lost."""
        task = asyncio.ensure_future(sending)
        try:
            while not task.done() and self.newest.epoch == epoch:
                self._stirred.clear()
                stirred = asyncio.ensure_future(self._stirred.wait())
                await asyncio.wait({task, stirred}, return_when=asyncio.FIRST_COMPLETED)
                stirred.cancel()
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            return False
        task.result()  # an error of ours surfaces here
        return True

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
            await self._report_lost(peer, message.epoch)

    async def _channel(self, peer: PeerId) -> Channel:
        channel = self._channels.get(peer)
        if channel is None or channel.closed.is_set():
            channel = self._channels[peer] = await self._around.channel(peer)
            self._watches.enter_context(channel.watched())
        return channel

    async def _report_lost(self, peer: PeerId, epoch: int) -> None:
        await self.tell(Lost(self.open.session, epoch, peer))

    async def tell(self, message: PeerMessage) -> None:
        """To the asker. One that is gone hears nothing: the lease then ends the session."""
        with contextlib.suppress(ConnectionLost):
            await self.asker.send(message, b"", Priority.CONTROL)


def scope(asker: PeerId, opened: Open) -> Hashable:
    """Whose prefixes a session shares: of the same asker, computed by the same hops up to this one."""
    hops = opened.route[: opened.index + 1]
    return asker, opened.adapter, tuple((entry.peer, entry.start, entry.end) for entry in hops)


def _same_layers(one: RouteSpan, other: RouteSpan) -> bool:
    return (one.start, one.end) == (other.start, other.end)


def _after(held: Sequence[int], index: int) -> int | None:
    """What the hop after this one holds, if it is told."""
    return held[index + 1] if index + 1 < len(held) else None
