"""Carry out a session: channels, time and cancellation around the pure machine in `session.py`."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from contextlib import ExitStack
from typing import Any

from shared.background import Background
from shared.channel import Channel, Dialer
from shared.client.session import (
    ClientSession,
    Drawn,
    Effect,
    Emit,
    Event,
    Finish,
    Leaving,
    PageNamer,
    PeerLost,
    Planner,
    Received,
    Request,
    Rerouted,
    Send,
    Spare,
)
from shared.errors import ConnectionLost, SessionFailed
from shared.identity import PeerId
from shared.protocol import Close, PeerMessage, RouteSpan

RENEW_S = 10.0
"""A third of the lease that hops give a session."""
OPEN_TIMEOUT_S = 10.0
STALL_S = 120.0
"""Heartbeats notice lost peers within 1.5 s; this only ends a session whose peers live but are stuck."""
CLOSE_TIMEOUT_S = 2.0
INBOX_SIZE = 4096
"""Messages waiting for a session. The credit window bounds them far below; when a peer sends more all the
same, its channel waits until we have caught up."""


class Generation:
    """One running session. Iterate `events()` once; leaving the iteration closes the session at every hop.

    `tasks` outlives the iteration, so that the last goodbyes need not be waited for. `reserved` is called
    when every hop has the session's memory, before the prompt is computed.
    """

    def __init__(
        self,
        dialer: Dialer,
        request: Request,
        plan: Planner,
        name_pages: PageNamer,
        tasks: Background,
        spare: Spare,
        is_there: Callable[[PeerId], bool],
        reserved: Callable[[], None] = lambda: None,
    ) -> None:
        self.session = secrets.token_hex(16)
        self._dialer = dialer
        self._machine = ClientSession(
            self.session, request, plan, name_pages, spare=spare, is_there=is_there, clock=time.monotonic
        )
        self._tasks = tasks
        self._reserved: Callable[[], None] | None = reserved
        self._inbox: asyncio.Queue[Event | Exception] = asyncio.Queue(INBOX_SIZE)
        self._outboxes: dict[PeerId, asyncio.Queue[Send]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._channels: dict[PeerId, Channel] = {}
        self._told_leaving: set[PeerId] = set()
        self._watches = ExitStack()

    @property
    def peers(self) -> list[PeerId]:
        """The peers of its route."""
        return self._machine.peers

    @property
    def route(self) -> list[RouteSpan]:
        """Its route, as it is now."""
        return self._machine.route

    @property
    def tokens(self) -> list[int]:
        """The prompt and what was drawn so far."""
        return self._machine.tokens

    @property
    def standbys(self) -> list[RouteSpan]:
        """Who stands by for which layers of it."""
        return self._machine.standbys

    @property
    def behind(self) -> dict[PeerId, int]:
        """How many positions each of them still lacks."""
        return self._machine.behind

    @property
    def replaying(self) -> dict[PeerId, int]:
        """Of a route that has not worked yet: how many positions each peer has to compute first."""
        return self._machine.replaying

    def received(self, channel: Channel, message: PeerMessage) -> Awaitable[None] | None:
        """A message of this session came in from a hop. Gives what to wait for when too many others wait."""
        event = Received(channel.peer, message, time.monotonic())
        if self._inbox.full():
            return self._inbox.put(event)
        self._inbox.put_nowait(event)
        return None

    def channel_closed(self, channel: Channel) -> None:
        """Only the channel in use counts: an old one may close after its peer was dialled anew."""
        if self._channels.get(channel.peer) is channel:
            del self._channels[channel.peer]
            alive = channel.said_bye or channel.peer in self._dialer.channels
            self._start(self._inbox.put(PeerLost(channel.peer, alive)))

    def leaving(self, peer: PeerId) -> None:
        """A peer of its route, or one that stands by, has said that it goes away."""
        if peer not in self._told_leaving:
            self._told_leaving.add(peer)
            self._start(self._inbox.put(Leaving(peer)))

    async def events(self) -> AsyncGenerator[Drawn | Rerouted, None]:
        """Tokens and re-routes until the answer is complete.

        Raises NoRoute, Busy or SessionFailed with one sentence for people; what was yielded stays valid.
        """
        self._start(self._renew())
        pending: deque[Effect] = deque(self._machine.start())
        try:
            while True:
                while pending:
                    match pending.popleft():
                        case Send() as send:
                            self._post(send)
                        case Emit(event=event):
                            yield event
                        case Finish(error=None):
                            return
                        case Finish(error=error):
                            raise error  # type: ignore[misc]  # the case above took None
                pending.extend(await self._next_effects())
        finally:
            self._post_all(self._machine.cancel())
            self._tasks.start(self._say_goodbye())

    async def _next_effects(self) -> list[Effect]:
        waiting, wake_at = self._machine.awaiting, self._machine.wake_at
        patience_s = OPEN_TIMEOUT_S if waiting else STALL_S
        if wake_at is not None:
            patience_s = min(patience_s, max(0.0, wake_at - time.monotonic()))
        try:
            async with asyncio.timeout(patience_s):
                event = await self._inbox.get()
        except TimeoutError:
            if wake_at is not None:
                return self._machine.wake()
            if not waiting:
                raise SessionFailed(
                    f"no token came for {STALL_S:.0f} s although every peer answers; please ask again"
                ) from None
            return [effect for peer in waiting for effect in self._machine.handle(PeerLost(peer))]
        if isinstance(event, Exception):
            raise event
        effects = self._machine.handle(event)
        if self._reserved is not None and self._machine.running:
            self._reserved()
            self._reserved = None
        return effects

    # ------------------------------------------------------------ sending

    def _post(self, send: Send) -> None:
        """Messages to one hop keep their order; hops do not wait for each other."""
        if send.peer not in self._outboxes:
            # Not bounded by a number: a session posts an open, its prompt's steps, and few small messages.
            self._outboxes[send.peer] = asyncio.Queue()
            self._start(self._deliver(send.peer))
        self._outboxes[send.peer].put_nowait(send)

    def _post_all(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._post(effect)

    async def _deliver(self, peer: PeerId) -> None:
        outbox = self._outboxes[peer]
        while True:
            send = await outbox.get()
            try:
                await self._deliver_one(send)
            except ConnectionLost:
                if not isinstance(send.message, Close):
                    await self._inbox.put(PeerLost(peer))
            except Exception as error:  # a mistake of ours surfaces where the asker is waiting
                await self._inbox.put(error)
            finally:
                outbox.task_done()

    async def _deliver_one(self, send: Send) -> None:
        if isinstance(send.message, Close) and send.peer not in self._channels:
            return  # never dial a peer only to say goodbye
        channel = await self._dialer.channel(send.peer)
        if self._channels.get(send.peer) is not channel:
            self._channels[send.peer] = channel
            self._watches.enter_context(channel.watched())
        await channel.send(send.message, send.body, send.lane)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            self._post_all(self._machine.renew())

    # ------------------------------------------------------------ ending

    async def _say_goodbye(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*(outbox.join() for outbox in self._outboxes.values()))
        self._watches.close()
        for task in list(self._running):
            task.cancel()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.start(coroutine)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
