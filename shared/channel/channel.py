"""An authenticated pipe of messages between two participants, open at once and moved to better paths unseen.

It owns the numbers, credit and order of frames (`flow`), the choice of the link that carries them, and the
pulse by which a dead peer is noticed. How links come about is for `relayed`, `webrtc` and `upgrade`; who is
called, and which channel is current, is for `dialer`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, assert_never

from shared.channel.flow import Inbound, Outbound, Sent
from shared.channel.link import Link, LinkPath
from shared.channel.relayed import Meeting, RelayedLink
from shared.channel.upgrade import Upgrade
from shared.channel.webrtc import DirectLink
from shared.errors import ChannelClosed, ProtocolError
from shared.framing import (
    CHANNEL_WIRE,
    HEADER_BYTES,
    PEER_WIRE,
    Priority,
    Splitter,
    aligned,
    read_header,
    whole_frame,
)
from shared.identity import PeerId, short
from shared.protocol import (
    Bye,
    ChannelMessage,
    Credit,
    Describe,
    Path,
    PeerMessage,
    Ping,
    Pong,
    decode,
    encode,
)

log = logging.getLogger(__name__)

CREDIT_DELAY_S = 0.05
# For a peer whose relay connection closed: a killed process answers nothing, a living one in a round trip.
PROOF_TICK_S = 0.05
PROOF_TICKS = 5
# How long a channel without a direct link outlives our own connection to the relay, and after its return how
# long the peer may take to return too.
RELAY_AWAY_S = 5.0
RELAY_BACK_S = 3.0
# A direct link that answers nothing for so long is closed, not only passed over.
DIRECT_SILENT_S = 5.0


class Pace(NamedTuple):
    """How often to look and to ask. All but the first are counted in ticks.

    A tick of ours that comes late counts once: when our own loop was held up, the others are not to blame.
    """

    tick_s: float
    ping: int
    standby_ping: int
    distrust: int
    dead: int

    def ticks(self, seconds: float) -> int:
        return round(seconds / self.tick_s)


# Two lost pings and the direct link is passed over, four and the peer is given up: 1.2 s.
WATCHED = Pace(tick_s=0.1, ping=3, standby_ping=30, distrust=6, dead=12)
IDLE = Pace(tick_s=1.0, ping=3, standby_ping=9, distrust=7, dead=10)

Handler = Callable[["Channel", PeerMessage, memoryview, Path], Awaitable[None]]
"""Takes the messages of a channel, one after the other. Until it returns, the sender's window shrinks, so it
must never wait for room in a channel: hand the message on, or two full channels wait for each other."""
MakeDirect = Callable[[tuple[str, int] | None, Callable[[Link, bytes], None], Callable[[], None]], DirectLink]


class Channel:
    """One channel; `dialer.channel(peer)` gives it. It closes once and is then replaced by a new one."""

    def __init__(
        self,
        peer: PeerId,
        relayed: RelayedLink,
        handler: Handler,
        *,
        dialled: bool,
        make_direct: MakeDirect | None,
        direct_limit: asyncio.Semaphore,
        on_closed: Callable[[Channel], None],
    ) -> None:
        self.peer = peer
        self.closed = asyncio.Event()
        self.reason = ""
        """Why it closed, as a sentence."""
        self.relayed = relayed
        self.direct: DirectLink | None = None
        """The direct link, when one is open; used while it is trusted."""
        relayed.on_room = self._pump
        self._handler = handler
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._outbound = Outbound()
        self._inbound = Inbound()
        self._senders: dict[Splitter, asyncio.Future[None]] = {}
        self._arrived = asyncio.Event()
        self._credit_timer: asyncio.TimerHandle | None = None
        self._trusted = False
        self._upgrade = Upgrade(
            make=make_direct and (lambda: make_direct(relayed.stun, self.received, self._pump)),
            limit=direct_limit,
            whereabouts=relayed.whereabouts,
            dialled=dialled,
            send=lambda message: self._tell(relayed, message),
            use=self._use_direct,
            drop=self._drop_direct,
            traffic=lambda: self._outbound.last + self._inbound.received,
        )
        self._running = False
        self._links_stopped = asyncio.Event()
        self._watchers = 0
        self._pace = IDLE
        self._ticks = 0
        self._silent_ticks = 0
        self._grace_ticks = 0
        self._proof = 0
        self._timer = self._loop.call_later(self._pace.tick_s, self._tick)

    # ------------------------------------------------------------ what its owner sees

    @property
    def path(self) -> LinkPath:
        """What carries messages now."""
        link = self._link
        return "relayed" if link is None else link.path

    @property
    def why_relayed(self) -> str:
        """Why messages do not go directly, in words; empty while they do."""
        if self.path == "direct":
            return ""
        return "the direct link does not answer" if self.direct is not None else self._upgrade.why_relayed

    @property
    def rtt_ms(self) -> float | None:
        """The round trip on the present path, once a ping was answered there."""
        link = self._link
        return None if link is None else link.rtt_ms

    async def send(
        self,
        message: PeerMessage,
        body: bytes | bytearray | memoryview = b"",
        priority: Priority = Priority.DECODE,
    ) -> None:
        """Send a message; waits while the peer has not consumed what it has. Raises ChannelClosed.

        Messages of one priority keep their order. The body must not change before this returns. That it
        returned does not mean that the peer got it: only an answer does.
        """
        if self.closed.is_set():
            raise self._closed_error()
        meta = aligned(encode(message))
        if isinstance(body, memoryview):
            body = body.cast("B")
        link = self._link
        if link is not None and link.ready and (sent := self._outbound.straight(priority, meta, body)):
            self._transmit(link, sent)
            return
        waiting = Splitter(meta, memoryview(body), priority, stream=priority)
        self._outbound.waiting[priority].append(waiting)
        done = self._senders[waiting] = self._loop.create_future()
        self._pump()
        try:
            await done
        except asyncio.CancelledError:
            self._give_up(waiting)
            raise

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, a silent peer is given up after 1.2 s; else after ten."""
        self._watchers += 1
        if self._watchers == 1:
            self._set_pace(WATCHED)
        try:
            yield
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                self._set_pace(IDLE)

    @property
    def watching(self) -> bool:
        return self._watchers > 0

    async def close(self, reason: str = "closed on purpose") -> None:
        """Say goodbye and stop both links. A handler that runs is left to finish; what it left is dropped."""
        self.end(reason, bye=True)
        await self._links_stopped.wait()

    # ------------------------------------------------------------ its life, lived by the dialer

    async def run(self) -> None:
        """Hand messages to the handler and seek a direct link, until closed."""
        self._running = True
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._handle())
            upgrade = tasks.create_task(self._upgrade.run())
            await self.closed.wait()
            upgrade.cancel()
            await asyncio.wait([upgrade])
            # The handler may still be at its last message.
            self._links_stopped.set()

    def stopped(self) -> None:
        """`run` is over, for whatever reason."""
        self.end("this side stops", bye=True)
        self._links_stopped.set()

    def greet(self) -> None:
        """The first word, which proves to the other side that we hold our key, and times the path."""
        self._ping(self.relayed)

    def end(self, reason: str, *, bye: bool) -> None:
        """Close at once, telling the other side or not."""
        if self.closed.is_set():
            return
        if bye:
            for link in self._links():
                self._tell(link, Bye(reason[:1000]))
        self.reason = reason
        self.closed.set()
        self._arrived.set()
        if not self._running:
            self._links_stopped.set()
        self._timer.cancel()
        if self._credit_timer is not None:
            self._credit_timer.cancel()
        for done in self._senders.values():
            if not done.done():
                done.set_exception(self._closed_error())
        self._senders.clear()
        self.relayed.leave()
        log.info("the channel to %s closed: %s", short(self.peer), reason)
        self._on_closed(self)

    def _closed_error(self) -> ChannelClosed:
        return ChannelClosed(f"the channel to {short(self.peer)} is closed: {self.reason}")

    # ------------------------------------------------------------ sending

    @property
    def _link(self) -> Link | None:
        """What carries frames now: direct while it is trusted, else relayed, else whatever is left."""
        if self._trusted:
            return self.direct
        return self.relayed if self.relayed.up else self.direct

    def _links(self) -> list[Link]:
        return [self.relayed, self.direct] if self.direct is not None else [self.relayed]

    def _transmit(self, link: Link, sent: Sent) -> None:
        link.carried += 1
        sent.link = link
        sent.place = link.carried
        link.send(sent.data)

    def _pump(self) -> None:
        """Give the link what waits, most urgent first, while it and the window have room."""
        while not self.closed.is_set() and not self._outbound.idle:
            link = self._link
            if link is None or not link.ready or (taken := self._outbound.take()) is None:
                return
            sent, message = taken
            self._transmit(link, sent)
            if message is not None and message.finished:
                done = self._senders.pop(message)
                if not done.done():
                    done.set_result(None)

    def _give_up(self, waiting: Splitter) -> None:
        if self._senders.pop(waiting, None) is not None:
            self._outbound.give_up(waiting)
            self._pump()

    def _tell(self, link: Link, message: ChannelMessage) -> None:
        link.send(whole_frame(CHANNEL_WIRE, Priority.CONTROL, 0, encode(message)))

    def _send_credit(self) -> None:
        if self._credit_timer is not None:
            self._credit_timer.cancel()
            self._credit_timer = None
        link = self._link
        if link is not None and (consumed := self._inbound.credit()) is not None:
            self._tell(link, Credit(consumed))

    def _credit_later(self) -> None:
        """Tell what was consumed: at once when it is much, else together with what follows."""
        if self._inbound.credit_due():
            self._send_credit()
        elif self._credit_timer is None:
            self._credit_timer = self._loop.call_later(CREDIT_DELAY_S, self._send_credit)

    # ------------------------------------------------------------ receiving

    def received(self, link: Link, frame: bytes) -> None:
        """A frame arrived on one of the links. Never raises: it is called from inside them."""
        if self.closed.is_set():
            return
        link.silent_ticks = self._silent_ticks = self._grace_ticks = 0
        try:
            header = read_header(frame)
            if header.kind == PEER_WIRE:
                self._inbound.push(header, frame, link.path)
                if self._inbound.inbox:
                    self._arrived.set()
                else:
                    self._credit_later()
            else:
                self._told(link, decode(memoryview(frame)[HEADER_BYTES:], ChannelMessage))
        except ProtocolError as error:
            self.end(str(error), bye=True)
        except Exception:
            log.exception("a frame of %s met an error of ours", short(self.peer))
            self.end("an error on this side", bye=True)

    def _told(self, link: Link, message: ChannelMessage) -> None:
        match message:
            case Ping():
                if message.deaf and self._trusted and self.direct is not None:
                    self._leave_direct(self.direct)
                # A link that is behind answers no pings, so nobody can fill our memory with answers.
                if link.ready:
                    pong = Pong(message.number, self._inbound.received, self._inbound.settle())
                    self._tell(link, pong)
            case Pong():
                self._answered(link, message)
            case Credit():
                self._outbound.consumed(message.received)
                self._pump()
            case Describe():
                self._upgrade.described(message)
            case Bye():
                self.end(message.reason or "the other side closed it", bye=False)
            case _:
                assert_never(message)

    def _answered(self, link: Link, pong: Pong) -> None:
        place = link.answered(pong.number, time.perf_counter())
        if place is None:
            return
        if link is self.direct:
            self._trusted = True
            self._proof = 0
        self._outbound.consumed(pong.consumed)
        self._outbound.answered(link, place, pong.received)
        self._pump()

    async def _handle(self) -> None:
        """Hand on one message after the other. What a handler raises ends the channel, not the process."""
        while not self.closed.is_set():
            arrived = self._inbound.next()
            if arrived is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            try:
                message = decode(arrived.message.meta, PeerMessage)
                await self._handler(self, message, arrived.message.body, arrived.path)
            except ProtocolError as error:
                self.end(str(error), bye=True)
            except Exception:
                log.exception("a message of %s met an error of ours", short(self.peer))
                self.end("an error on this side", bye=True)
            else:
                # Freed before the sender hears that there is room.
                del arrived
                self._inbound.handled()
                self._credit_later()

    # ------------------------------------------------------------ the direct link

    def _use_direct(self, link: DirectLink) -> None:
        """A direct link opened; it carries messages once it has answered a ping."""
        self.direct = link
        self._ping(link)

    def _drop_direct(self, link: DirectLink) -> None:
        if link is not self.direct:
            return
        self.direct = None
        self._leave_direct(link)
        if self.relayed.gone:
            self.end("its direct link ended, and it is at no relay", bye=False)

    def _leave_direct(self, link: DirectLink) -> None:
        """From now on by the relay, beginning with what the direct link may not have delivered.

        The other side hears of it: it may still hear us directly, and would go on speaking to deaf ears.
        """
        self._trusted = False
        self._outbound.link_lost(link)
        self._ping(self.relayed, deaf=True)
        self._pump()

    # ------------------------------------------------------------ the relays

    def relay_back(self, meeting: Meeting) -> None:
        """A relay connection of ours came back: the peer may be there, or come back a little later."""
        self.relayed.present(meeting)
        self._grace_ticks = self._pace.ticks(RELAY_BACK_S)
        self._silent_ticks = 0
        self._ping(self.relayed)
        self._pump()

    def relay_cut(self, meeting: Meeting) -> None:
        """A relay connection of ours ended: frames on their way through it may be lost."""
        self.relayed.cut(meeting)
        self._outbound.link_lost(self.relayed)
        self._pump()

    def relay_dropped(self) -> None:
        """The relay dropped a frame of ours, since the peer reads too slowly; a ping tells which, soon."""
        self._loop.call_later(2 * CREDIT_DELAY_S, self._ping, self.relayed)

    def relay_gone(self, meeting: Meeting) -> None:
        """A relay says that the peer's connection closed: very likely its process is gone."""
        was_up, was_heard = self.relayed.up, self.relayed.heard
        if self._grace_ticks or not was_up:
            return
        self.relayed.absent(meeting)
        self._outbound.link_lost(self.relayed)
        if self.relayed.up:
            self._ping(self.relayed)
            self._pump()
        elif self.direct is None:
            self.end("the relay lost it", bye=False)
        elif was_heard:
            self._ping(self.direct)
            self._proof = PROOF_TICKS
            self._loop.call_later(PROOF_TICK_S, self._proof_tick)

    def _proof_tick(self) -> None:
        if self._proof == 0 or self.closed.is_set():
            return
        self._proof -= 1
        if self._proof == 0:
            self.end("the relay lost it, and its direct link is silent", bye=False)
        else:
            self._loop.call_later(PROOF_TICK_S, self._proof_tick)

    # ------------------------------------------------------------ the pulse

    def _set_pace(self, pace: Pace) -> None:
        self._pace = pace
        self._ticks = self._silent_ticks = self._grace_ticks = 0
        for link in self._links():
            link.silent_ticks = 0
        if not self.closed.is_set():
            self._timer.cancel()
            self._timer = self._loop.call_later(pace.tick_s, self._tick)
            for link in self._links():
                self._ping(link)

    def _ping(self, link: Link, *, deaf: bool = False) -> None:
        """Ask, even over a link that is behind: what makes it so may be that nobody is there."""
        if not self.closed.is_set():
            self._tell(link, Ping(link.pinged(time.perf_counter()), deaf))

    def _tick(self) -> None:
        pace = self._pace
        self._timer = self._loop.call_later(pace.tick_s, self._tick)
        self._ticks += 1
        self._silent_ticks += 1
        self._grace_ticks = max(0, self._grace_ticks - 1)
        for link in self._links():
            link.silent_ticks += 1
            used = link is self._link or link is self.direct
            if link is self.relayed and not self.relayed.up and self._ticks % pace.standby_ping == 0:
                self.relayed.retry()
            if self._ticks % (pace.ping if used else pace.standby_ping) == 0:
                self._ping(link)
        if self.direct is not None:
            self._look_at_direct(self.direct)
        patience = pace.dead if self.relayed.up or self.direct is not None else pace.ticks(RELAY_AWAY_S)
        if self._silent_ticks >= max(patience, 1) and not self._grace_ticks:
            self.end(f"no sign of life for {self._silent_ticks * pace.tick_s:.1f} s", bye=True)

    def _look_at_direct(self, link: DirectLink) -> None:
        if link.overrun or link.silent_ticks >= self._pace.ticks(DIRECT_SILENT_S) + self._pace.distrust:
            link.lost.set()
        elif self._trusted and link.silent_ticks >= self._pace.distrust and self.relayed.up:
            self._leave_direct(link)
