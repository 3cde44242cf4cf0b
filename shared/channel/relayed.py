"""The way to a peer through relays: usable at once, sealed from end to end.

A relay drops and delays, and this link with it; it never repairs anything, the channel does. A channel may be
reached by several relays and uses one of them at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from shared.channel.link import Link
from shared.channel.nat import look
from shared.channel.sealed import Keys
from shared.errors import ConnectionLost
from shared.identity import PeerId
from shared.protocol import NatKind, Signal

log = logging.getLogger(__name__)

# Beyond this, links wait before they give more. Short, since urgent frames cannot overtake what is in here.
QUEUE_BYTES = 64 * 1024
# Nobody tells when a peer comes back to a relay. Trying costs the relay a frame and an answer.
ABSENT_S = 0.5


class Relay(Protocol):
    """What channels need of a connection to a relay; `RelayClient` is one."""

    @property
    def connected(self) -> asyncio.Event: ...
    @property
    def stun(self) -> tuple[str, int] | None: ...
    @property
    def second_stun_port(self) -> int: ...
    @property
    def address(self) -> str: ...
    @property
    def on_signal(self) -> Callable[[Callable[[Signal], None]], None]: ...
    @property
    def on_frame(self) -> Callable[[Callable[[PeerId, memoryview], None]], None]: ...
    @property
    def on_gone(self) -> Callable[[Callable[[PeerId], None]], None]: ...
    @property
    def on_dropped(self) -> Callable[[Callable[[PeerId], None]], None]: ...
    @property
    def on_state(self) -> Callable[[Callable[[bool], None]], None]: ...
    def send_signal(self, signal: Signal) -> Coroutine[Any, Any, None]: ...
    def send_frame(
        self, peer: PeerId, *parts: bytes | bytearray | memoryview
    ) -> Coroutine[Any, Any, None]: ...
    def send_at_once(self, peer: PeerId, *parts: bytes | bytearray | memoryview) -> bool: ...


class Meeting:
    """One relay with the frames that wait for it; `run` passes them on.

    The queue holds at most `QUEUE_BYTES` and one frame of each link that saw room; then links are not ready.
    When the connection ends, what waits is dropped: pings tell the channels later.
    """

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.links: set[RelayedLink] = set()
        self.nat: NatKind = "unknown"
        """What the router does that stands between us and this relay."""
        self._queue: deque[tuple[PeerId, bytes, bytes]] = deque()
        self._queued_bytes = 0
        self._was_full = False
        self._filled = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self.relay.connected.is_set()

    @property
    def full(self) -> bool:
        self._was_full = self._was_full or self._queued_bytes >= QUEUE_BYTES
        return self._queued_bytes >= QUEUE_BYTES

    def send(self, peer: PeerId, header: bytes, sealed: bytes) -> None:
        """Pass a frame on at once when nothing is in its way, else queue it."""
        if not self._queue:
            try:
                if self.relay.send_at_once(peer, header, sealed):
                    return
            except ConnectionLost:
                return
        self._queue.append((peer, header, sealed))
        self._queued_bytes += len(sealed)
        self._filled.set()

    async def run(self) -> None:
        """Pass on what waits, until cancelled."""
        while True:
            while self._queue:
                waiting = self._queue[0]
                peer, header, sealed = waiting
                try:
                    await self.relay.send_frame(peer, header, sealed)
                except ConnectionLost:
                    self.drop()
                    break
                # `drop` may have emptied the queue meanwhile.
                if self._queue and self._queue[0] is waiting:
                    self._queue.popleft()
                    self._queued_bytes -= len(sealed)
                self._tell_room()
            self._filled.clear()
            await self._filled.wait()

    async def look_at_router(self) -> None:
        """Find out about our router, by the STUN ports of this relay."""
        stun, second_port = self.relay.stun, self.relay.second_stun_port
        # The other ways of an IPv6 relay's name are not asked: no router translates there.
        if stun is not None and second_port and ":" not in stun[0]:
            self.nat = await look(*stun, second_port)
            log.info("our router is of the kind %s, seen from %s", self.nat, stun[0])

    def drop(self) -> None:
        self._queue.clear()
        self._queued_bytes = 0
        self._tell_room()

    def _tell_room(self) -> None:
        if self._was_full and self._queued_bytes < QUEUE_BYTES // 2:
            self._was_full = False
            for link in tuple(self.links):
                link.on_room()


class RelayedLink(Link):
    """Sealed frames by way of a relay."""

    path = "relayed"
    kind = "relayed"

    def __init__(self, peer: PeerId, meetings: Sequence[Meeting], via: Meeting, keys: Keys) -> None:
        super().__init__()
        self.on_room: Callable[[], None] = lambda: None
        self._peer = peer
        self._meetings = meetings
        self._via: Meeting | None = via
        self.heard = False
        """Whether the peer spoke here since a relay last said that it was gone."""
        self._absent: dict[Meeting, float] = {}
        self._keys = keys
        for meeting in meetings:
            meeting.links.add(self)

    @property
    def up(self) -> bool:
        """Whether some relay may reach the peer."""
        return self._via is not None

    @property
    def gone(self) -> bool:
        """True when every relay that we reach says that the peer is not there; False when we reach none."""
        reached = [meeting for meeting in self._meetings if meeting.connected]
        return bool(reached) and all(meeting in self._absent for meeting in reached)

    @property
    def stun(self) -> tuple[str, int] | None:
        """A STUN responder that both ends can reach: that of the relay in use."""
        return self._via.relay.stun if self._via else None

    def whereabouts(self) -> tuple[NatKind, str]:
        """What our router does, and where the relay in use sees us."""
        return (self._via.nat, self._via.relay.address) if self._via else ("unknown", "")

    @property
    def further(self) -> bytes:
        """What the keys of the channel's sockets are made from."""
        return self._keys.further

    @property
    def refused(self) -> int:
        """Frames that came under this channel's name and did not open."""
        return self._keys.opener.refused

    @property
    def ready(self) -> bool:
        return self._via is not None and not self._via.full

    def send(self, frame: bytes) -> None:
        if self._via is not None:
            self._via.send(self._peer, *self._keys.seal(frame))

    def open(self, meeting: Meeting, sealed: memoryview) -> bytes | None:
        """What a sealed frame holds, if it is the peer's next word; then it is there, by this relay."""
        frame = self._keys.opener(sealed)
        if frame is not None:
            self.heard = True
            if meeting in self._absent:
                self.present(meeting)
        return frame

    def present(self, meeting: Meeting) -> None:
        """The peer may be at this relay (again)."""
        self._absent.pop(meeting, None)
        self._choose()

    def absent(self, meeting: Meeting) -> None:
        """This relay says that the peer is not there. Others may have got it back since they said so."""
        self._absent[meeting] = time.monotonic()
        self._choose()
        if self._via is None:
            self.retry()
        self.heard = self.heard and self._via is not None

    def retry(self) -> None:
        """Believe in the peer's absence no longer where it was told a while ago."""
        past = time.monotonic() - ABSENT_S
        self._absent = {meeting: told for meeting, told in self._absent.items() if told > past}
        self._choose()

    def cut(self, meeting: Meeting) -> None:
        """Our own connection to this relay ended; where the peer is, nobody knows."""
        self.present(meeting)

    def leave(self) -> None:
        """The channel is closed."""
        self._via = None
        for meeting in self._meetings:
            meeting.links.discard(self)

    def _choose(self) -> None:
        usable = [meeting for meeting in self._meetings if meeting.connected and meeting not in self._absent]
        if self._via not in usable:
            self._via = usable[0] if usable else None
