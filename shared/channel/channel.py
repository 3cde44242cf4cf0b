"""An authenticated pipe of messages between two participants, open at once and moved to better paths unseen.

It owns the numbers, credit and order of frames (`flow`), asks `path_choice` which link carries them, and
keeps the pulse by which a dead link or peer is noticed. How links come about is for `relayed`, `upgrade` and
`sockets`; who is called, and which channel is current, is for `dialer`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, assert_never

from shared.channel.addresses import Interface
from shared.channel.flow import CREDIT_DELAY_S, Inbound, Outbound, Sent
from shared.channel.link import Link, LinkKind, LinkPath
from shared.channel.listening import ListeningPort
from shared.channel.path_choice import Way, choose, window_bytes
from shared.channel.relayed import Meeting, RelayedLink
from shared.channel.sockets import TRYING, Sockets
from shared.channel.tcp import SocketLink
from shared.channel.upgrade import OPENING, Upgrade
from shared.channel.webrtc import DirectLink
from shared.errors import ChannelClosed, ProtocolError
from shared.framing import (
    CHANNEL_WIRE,
    HEADER_BYTES,
    PEER_WIRE,
    PRIORITY_SHIFT,
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
    Listening,
    Path,
    PeerMessage,
    Ping,
    Pong,
    decode,
    encode,
)

log = logging.getLogger(__name__)

CANCEL_AGAIN_S = 0.2
# For a peer whose relay connection closed: a killed process answers nothing, a living one in a round trip.
PROOF_TICK_S = 0.05
PROOF_TICKS = 5
# How long a channel without a direct link outlives our own connection to the relay, and after its return how
# long the peer may take to return too.
RELAY_AWAY_S = 5.0
RELAY_BACK_S = 3.0
# A direct link that answers nothing for so long is closed, not only passed over.
DIRECT_SILENT_S = 5.0
# Without messages for so long, direct links are closed; the next message goes by the relay while they reopen.
QUIET_S = 45.0
# A path that was taken by choice stays so long, so that two alike paths do not alternate.
SETTLED_S = 5.0


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


# Two lost pings and a link is passed over, four and the peer is given up: 1.2 s.
WATCHED = Pace(tick_s=0.1, ping=3, standby_ping=30, distrust=6, dead=12)
IDLE = Pace(tick_s=1.0, ping=3, standby_ping=9, distrust=7, dead=10)

Handler = Callable[["Channel", PeerMessage, memoryview, Path], Awaitable[None] | None]
"""Takes the messages of a channel, one after the other, where they are read. What it returns is waited for
before the next one, and the sender's window shrinks meanwhile, so that must never be room in a channel: hand
the message on, or two full channels wait for each other."""
MakeDirect = Callable[[tuple[str, int] | None, Callable[[Link, bytes], None], Callable[[], None]], DirectLink]
DirectPath = DirectLink | SocketLink


class PathReport(NamedTuple):
    """What carries a channel's messages now, for people."""

    kind: LinkKind
    rtt_ms: float | None
    goodput: float | None
    """Bytes a second, once there was so much to send that it could be measured."""
    why: str
    """Why nothing better does, in words; empty when this is the best there is."""
    resting: bool = False
    """A direct path was closed because nothing was said, and opens again with the next message."""

    def words(self) -> str:
        """All of it in one line."""
        figures = [] if self.rtt_ms is None else [f"{self.rtt_ms:.1f} ms there and back"]
        if self.goodput is not None:
            figures.append(f"{self.goodput / 1e6:.1f} MB/s")
        return ", ".join([self.kind, *figures]) + (f" ({self.why})" if self.why else "")


class Openings(NamedTuple):
    """By what direct links come about. On relay-only sides `make_direct` and `interfaces` are None.

    `neighbours` says that the two may be in one network, and tell each other their addresses there.
    """

    make_direct: MakeDirect | None
    direct_limit: asyncio.Semaphore
    port: ListeningPort | None
    interfaces: Callable[[], frozenset[Interface]] | None
    socket_limit: asyncio.Semaphore
    neighbours: bool = True


class Channel:
    """One channel; `dialer.channel(peer)` gives it. It closes once and is then replaced by a new one."""

    def __init__(
        self,
        peer: PeerId,
        relayed: RelayedLink,
        handler: Handler,
        *,
        dialled: bool,
        openings: Openings,
        on_closed: Callable[[Channel], None],
    ) -> None:
        self.peer = peer
        self.closed = asyncio.Event()
        self.reason = ""
        """Why it closed, as a sentence."""
        self.said_bye = False
        """The other side closed it, so it was there."""
        self.relayed = relayed
        self.directs: list[DirectPath] = []
        """The direct links that are open; used while they are trusted."""
        relayed.on_room = self._pump
        # Not proven yet, but the greetings came that way.
        relayed.trusted = True
        self._handler = handler
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._outbound = Outbound()
        self._inbound = Inbound()
        self._senders: dict[Splitter, asyncio.Future[None]] = {}
        self._waits_for: Awaitable[None] | None = None
        """What the handler wants to see done before the next message."""
        self._stirred = asyncio.Event()
        self._credit_timer: asyncio.TimerHandle | None = None
        self._path: Link | None = relayed if relayed.up else None
        """What carries frames now."""
        self._doubted: Link | None = None
        """The link that carried them until it fell silent; urgent frames go there too, until it is closed."""
        make_direct = openings.make_direct
        self._upgrade = Upgrade(
            make=make_direct and (lambda: make_direct(relayed.stun, self.received, self._pump)),
            limit=openings.direct_limit,
            whereabouts=relayed.whereabouts,
            neighbours=openings.neighbours,
            dialled=dialled,
            send=lambda message: self._tell(relayed, message),
            use=self._use_direct,
            drop=self._drop_direct,
            traffic=self._traffic,
        )
        self._sockets = Sockets(
            further=relayed.further,
            port=openings.port,
            interfaces=openings.interfaces,
            neighbours=openings.neighbours,
            limit=openings.socket_limit,
            dialled=dialled,
            send=lambda message: self._tell(relayed, message),
            on_frame=self.received,
            on_room=self._pump,
            use=self._use_direct,
            drop=self._drop_direct,
            traffic=self._traffic,
        )
        self._running = False
        self._links_stopped = asyncio.Event()
        self._watchers = 0
        self._pace = IDLE
        self._ticks = 0
        self._silent_ticks = 0
        self._grace_ticks = 0
        self._settled_ticks = 0
        self._quiet_ticks = 0
        self._quiet = False
        self._was_direct = False
        self._seen_traffic = 0
        self._proof = 0
        self._timer = self._loop.call_later(self._pace.tick_s, self._tick)

    # ------------------------------------------------------------ what its owner sees

    @property
    def path(self) -> LinkPath:
        """What carries messages now."""
        return "relayed" if self._path is None else self._path.path

    @property
    def direct(self) -> DirectLink | None:
        """The data channel, when one is open."""
        return next((link for link in self.directs if isinstance(link, DirectLink)), None)

    @property
    def socket(self) -> SocketLink | None:
        """A socket, when one is open."""
        return next((link for link in self.directs if isinstance(link, SocketLink)), None)

    @property
    def rtt_ms(self) -> float | None:
        """The round trip on the present path, once a ping was answered there."""
        return None if self._path is None else self._path.rtt_ms

    @property
    def why_relayed(self) -> str:
        """Why messages do not go directly, in words; empty while they do. Of sockets `report` tells too."""
        if self.path == "direct":
            return ""
        if self._resting:
            return "nothing was said for a while; direct paths open again with the next message"
        if any(link.trusted for link in self.directs):
            return "the relay is much faster than the direct paths"
        if self.directs:
            return "the direct link does not answer"
        return self._upgrade.why_relayed

    @property
    def _resting(self) -> bool:
        return self._quiet and self._was_direct

    @property
    def seeking(self) -> bool:
        """Whether attempts at direct links run, so that the path may soon be a better one."""
        if self.closed.is_set():
            return False
        if self.socket is not None:
            return not self.socket.trusted
        if self._sockets.why_none == TRYING:
            return True
        return self._upgrade.why_relayed == OPENING and (self.direct is None or not self.direct.trusted)

    def report(self) -> PathReport:
        """What carries messages now, how well, and why nothing better does."""
        link = self._path
        if link is None:
            return PathReport("relayed", None, None, "no relay has the peer, and no direct path is open")
        why = self.why_relayed
        no_socket = "the socket is slower" if self.socket else f"socket: {self._sockets.why_none}"
        if link.kind == "data channel":
            why = no_socket
        elif why == self._upgrade.why_relayed != self._sockets.why_none:
            why = f"data channel: {why}; {no_socket}"
        resting = link.kind == "relayed" and self._resting
        return PathReport(link.kind, link.rtt_ms, link.goodput, why, resting)

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
        link = self._path
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
            tasks.create_task(self._wait_for_handler())
            seeking = [tasks.create_task(self._upgrade.run()), tasks.create_task(self._sockets.run())]
            await self.closed.wait()
            await _end(seeking)
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
        self._stirred.set()
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

    def _links(self) -> list[Link]:
        return [self.relayed, *self.directs]

    def _traffic(self) -> int:
        return self._outbound.last + self._inbound.received

    def _transmit(self, link: Link, sent: Sent) -> None:
        link.carried += 1
        sent.link = link
        sent.place = link.carried
        link.send(sent.data)
        doubted = self._doubted
        if doubted is not None and doubted.ready and sent.data[1] >> PRIORITY_SHIFT <= Priority.DECODE:
            doubted.send(sent.data)  # The receiver drops what it has.

    def _pump(self) -> None:
        """Give the link what waits, most urgent first, while it and the window have room."""
        while not self.closed.is_set() and not self._outbound.idle:
            link = self._path
            if link is None or not link.ready or (taken := self._outbound.take(link.chunk_bytes)) is None:
                return
            sent, message = taken
            self._transmit(link, sent)
            if message is not None and message.finished:
                done = self._senders.pop(message)
                if not done.done():
                    done.set_result(None)

    def _consumed(self, received: int) -> None:
        """The peer consumed all up to this frame; when more waits, that tells what the path can do."""
        self._outbound.consumed(received)
        link = self._path
        if link is None:
            return
        if self._outbound.idle:
            link.calm()
        elif link.measure(time.perf_counter()):
            self._resize(link)

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
        link = self._path
        if link is not None and (consumed := self._inbound.credit()) is not None:
            self._tell(link, Credit(consumed))

    def _credit_later(self) -> None:
        """Tell what was consumed: at once when it is much, else together with what follows."""
        wait_s = self._inbound.credit_wait_s()
        if not wait_s:
            self._send_credit()
            return
        timer, due_at = self._credit_timer, self._loop.time() + wait_s
        if timer is not None:
            if timer.when() <= due_at:
                return
            timer.cancel()
        self._credit_timer = self._loop.call_at(due_at, self._send_credit)

    # ------------------------------------------------------------ receiving

    def received(self, link: Link, frame: bytes) -> None:
        """A frame arrived on one of the links. Never raises: it is called from inside them."""
        if self.closed.is_set():
            return
        link.silent_ticks = self._silent_ticks = self._grace_ticks = 0
        if self._path is None:
            self._choose()
        try:
            header = read_header(frame)
            if header.kind == PEER_WIRE:
                self._inbound.push(header, frame, link.path)
                if self._inbound.inbox:
                    self._hand_on()
                else:
                    self._credit_later()
            else:
                self._told(link, decode(memoryview(frame)[HEADER_BYTES:], ChannelMessage))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the channel, not the process, for what the peer sent or what we made of it."""
        if isinstance(error, ProtocolError):
            self.end(str(error), bye=True)
            return
        log.error("what %s sent met an error of ours", short(self.peer), exc_info=error)
        self.end("an error on this side", bye=True)

    def _told(self, link: Link, message: ChannelMessage) -> None:
        match message:
            case Ping():
                for deaf in tuple(self.directs):
                    if deaf.kind == message.deaf and deaf.trusted:
                        self._distrust(deaf, told=True)
                # A link that is behind answers no pings, so nobody can fill our memory with answers.
                if link.ready:
                    pong = Pong(message.number, self._inbound.received, self._inbound.settle())
                    self._tell(link, pong)
            case Pong():
                self._answered(link, message)
            case Credit():
                self._consumed(message.received)
                self._pump()
            case Describe():
                self._upgrade.described(message)
            case Listening():
                self._sockets.told(message)
                # Nobody says it twice without reason: its network may be another one now.
                self._upgrade.retry()
            case Bye():
                self.said_bye = True
                self.end(message.reason or "the other side closed it", bye=False)
            case _:
                assert_never(message)

    def _answered(self, link: Link, pong: Pong) -> None:
        place = link.answered(pong.number, time.perf_counter())
        if place is None:
            return
        link.trusted = True
        if link is self._doubted:
            self._doubted = None
        if link is not self.relayed:
            self._proof = 0
        self._consumed(pong.consumed)
        self._outbound.answered(link, place, pong.received)
        self._choose()
        self._pump()

    def _hand_on(self) -> None:
        """Give the handler one message after the other, until it wants to be waited for."""
        while self._waits_for is None and (arrived := self._inbound.next()) is not None:
            if self.closed.is_set():
                return
            try:
                message = decode(arrived.message.meta, PeerMessage)
                self._waits_for = self._handler(self, message, arrived.message.body, arrived.path)
            except Exception as error:
                self._fail(error)
                return
            # Freed before the sender hears that there is room.
            del arrived
            if self._waits_for is not None:
                self._stirred.set()
            elif not self.closed.is_set():
                self._inbound.handled()
                self._credit_later()

    async def _wait_for_handler(self) -> None:
        """Wait for what a message needs, and go on with those behind it."""
        while self._waits_for is not None or not self.closed.is_set():
            if self._waits_for is None:
                self._stirred.clear()
                await self._stirred.wait()
                continue
            try:
                await self._waits_for
            except Exception as error:
                self._fail(error)
            self._waits_for = None
            if not self.closed.is_set():
                self._inbound.handled()
                self._credit_later()
                self._hand_on()

    # ------------------------------------------------------------ paths

    def _choose(self) -> None:
        """Take the best link that there is now."""
        links = [link for link in self._links() if link is not self.relayed or self.relayed.up]
        ways = [Way(link.kind, link.trusted, link.least_rtt_ms, link.goodput) for link in links]
        current = links.index(self._path) if self._path in links else None
        settled = self._settled_ticks >= self._pace.ticks(SETTLED_S)
        chosen = choose(ways, current, settled=settled)
        path = None if chosen is None else links[chosen]
        if path is self._path:
            return
        before, self._path = self._path, path
        self._settled_ticks = 0
        if path is self._doubted:
            self._doubted = None
        if path is not None:
            path.silent_ticks = 0
            self._resize(path)
            self._ping(path)
            log.info("messages to %s now go by the %s path", short(self.peer), path.kind)
        if before in links:
            before.calm()
            # What it still carries is known to be there, or lost, with the answer.
            self._ping(before)
            if not before.trusted:
                self._doubted = before
                self._outbound.link_lost(before)
                self._pump()

    def _resize(self, link: Link) -> None:
        self._outbound.resize(window_bytes(Way(link.kind, link.trusted, link.base_rtt_ms, link.goodput)))

    def _use_direct(self, link: DirectPath) -> None:
        """A direct link opened; it carries messages once it has answered a ping."""
        self.directs.append(link)
        self._was_direct = True
        self._ping(link)

    def _drop_direct(self, link: DirectPath) -> None:
        if link not in self.directs:
            return
        self.directs.remove(link)
        if link is self._doubted:
            self._doubted = None
        self._distrust(link)
        if self.relayed.gone and not self.directs:
            self.end("its direct link ended, and it is at no relay", bye=False)

    def _distrust(self, link: Link, *, told: bool = False) -> None:
        """From now on by another one, beginning with what this one may not have delivered.

        The other side hears of it, unless it told us: it may still hear us there, and would go on speaking to
        deaf ears.
        """
        link.trusted = False
        self._choose()
        if link is not self._path:
            self._outbound.link_lost(link)
            alike = any(other.kind == link.kind for other in self.directs if other is not link)
            if self._path is not None and link is not self.relayed and not alike and not told:
                self._ping(self._path, deaf=link.kind)
        self._pump()

    def look_again(self) -> None:
        """This machine's addresses changed: links may be dead, and others may open."""
        for link in self._links():
            self._ping(link)
        self._sockets.moved()
        self._upgrade.retry()

    # ------------------------------------------------------------ the relays

    def relay_back(self, meeting: Meeting) -> None:
        """A relay connection of ours came back: the peer may be there, or come back a little later."""
        self.relayed.present(meeting)
        self._choose()
        self._grace_ticks = self._pace.ticks(RELAY_BACK_S)
        self._silent_ticks = 0
        self._ping(self.relayed)
        self._pump()

    def relay_cut(self, meeting: Meeting) -> None:
        """A relay connection of ours ended: frames on their way through it may be lost."""
        self.relayed.cut(meeting)
        self._choose()
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
        self._choose()
        self._outbound.link_lost(self.relayed)
        if self.relayed.up:
            self._ping(self.relayed)
            self._pump()
        elif not self.directs:
            self.end("the relay lost it", bye=False)
        elif was_heard:
            for link in self.directs:
                self._ping(link)
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

    def _ping(self, link: Link, *, deaf: LinkKind | None = None) -> None:
        """Ask, even over a link that is behind: what makes it so may be that nobody is there."""
        if not self.closed.is_set():
            self._tell(link, Ping(link.pinged(time.perf_counter()), deaf))

    def _tick(self) -> None:
        pace = self._pace
        self._timer = self._loop.call_later(pace.tick_s, self._tick)
        self._ticks += 1
        self._silent_ticks += 1
        self._settled_ticks += 1
        self._grace_ticks = max(0, self._grace_ticks - 1)
        for link in self._links():
            link.silent_ticks += 1
            used = link is self._path or link is not self.relayed
            if link is self.relayed and not self.relayed.up and self._ticks % pace.standby_ping == 0:
                self.relayed.retry()
            if self._ticks % (pace.ping if used else pace.standby_ping) == 0:
                self._ping(link)
        self._look_at_links()
        self._look_at_traffic()
        patience = pace.dead if self.relayed.up or self.directs else pace.ticks(RELAY_AWAY_S)
        if self._silent_ticks >= max(patience, 1) and not self._grace_ticks:
            self.end(f"no sign of life for {self._silent_ticks * pace.tick_s:.1f} s", bye=True)

    def _look_at_links(self) -> None:
        """Pass over those that are silent, and close those that are for long."""
        pace = self._pace
        for link in tuple(self.directs):
            if link.overrun or link.silent_ticks >= pace.ticks(DIRECT_SILENT_S) + pace.distrust:
                link.lost.set()
            elif link.trusted and link.silent_ticks >= pace.distrust:
                self._distrust(link)
        relayed = self.relayed
        if (
            relayed is self._path
            and relayed.trusted
            and relayed.silent_ticks >= pace.distrust
            and self.directs
        ):
            self._distrust(relayed)
        self._choose()

    def _look_at_traffic(self) -> None:
        """Close direct links when nothing is said for long, and seek them again with the next word."""
        traffic = self._traffic()
        if traffic != self._seen_traffic or self.watching:
            self._seen_traffic = traffic
            self._quiet_ticks = 0
            if self._quiet:
                self._quiet = False
                self._sockets.retry()
                self._upgrade.retry()
            return
        self._quiet_ticks += 1
        # Never the last path: without a relay nothing could bring another.
        if self._quiet_ticks >= self._pace.ticks(QUIET_S) and self.relayed.up:
            self._quiet = True
            for link in self.directs:
                link.lost.set()


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they end.

    aiortc waits by `asyncio.wait_for`, which in Python 3.11 loses a cancellation that comes together with
    what it waits for (bpo-42130): the attempt at a direct link then went on, and its channel never closed.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
