"""The sockets of one channel: tells the other side where we listen, and tries where it listens.

Both may listen. Then the caller tries first and the other side only if that led to nothing, so that two who
can reach each other end up with one socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence

from shared.channel.addresses import Address, Interface, public_interfaces, worth_trying
from shared.channel.link import Link
from shared.channel.listening import ListeningPort
from shared.channel.sealed import socket_keys, socket_tag
from shared.channel.tcp import TICKET_BYTES, SocketLink, dial
from shared.errors import ConnectionLost
from shared.protocol import Listening

log = logging.getLogger(__name__)

# The caller's head start: a handshake takes one round trip, two with the connection.
SECOND_S = 0.5
# The next address is tried when the one before has not answered so soon, or failed.
STAGGER_S = 0.15
# Between two rounds, whatever the other side asks for: each costs connections to addresses that it chose.
PAUSE_S = 5.0
RETRY_S = 60.0
RETRY_LOST_S = 10.0
# One that each side dialled; another comes when one of them is dead and nobody has noticed.
MAX_SOCKETS = 2
# Good hellos under one ticket, each remembered lest it comes again.
MAX_HELLOS = 32

RELAY_ONLY = "this side wants no direct links"
NO_PORT = "the other side listens on no port"
TRYING = "its addresses are being tried"
NOT_OURS = "its addresses are of networks that this side is not in"
LOST = "the socket was lost"


class Sockets:
    """`port` is None when this side listens on none, `interfaces` when it is to stay on the relay."""

    def __init__(
        self,
        *,
        further: bytes,
        port: ListeningPort | None,
        interfaces: Callable[[], frozenset[Interface]] | None,
        neighbours: bool,
        limit: asyncio.Semaphore,
        dialled: bool,
        send: Callable[[Listening], None],
        on_frame: Callable[[Link, bytes], None],
        on_room: Callable[[], None],
        use: Callable[[SocketLink], None],
        drop: Callable[[SocketLink], None],
        traffic: Callable[[], int],
    ) -> None:
        self.links: list[SocketLink] = []
        self.why_none = NO_PORT if interfaces is not None else RELAY_ONLY
        """Why there is no socket, in words; of no meaning while there is one."""
        self._further = further
        self._port = port
        self._interfaces = interfaces
        self._neighbours = neighbours
        self._limit = limit
        self._dialled = dialled
        self._send = send
        self._on_frame = on_frame
        self._on_room = on_room
        self._use = use
        self._drop = drop
        self._traffic = traffic
        self._theirs: Listening | None = None
        self._due = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._tag = b""
        self._seen: set[bytes] = set()

    def told(self, message: Listening) -> None:
        """The other side says where it listens, first or anew."""
        self._theirs = message
        self.why_none = TRYING
        self._due.set()

    def retry(self) -> None:
        """What was tried in vain may work now, or is needed again."""
        self._due.set()

    def moved(self) -> None:
        """Our own addresses are others than before."""
        if self._tasks is not None:
            self._tasks.create_task(self._tell())
        self._due.set()

    async def run(self) -> None:
        """Accept and try until cancelled."""
        if self._interfaces is None:
            return
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    await self._tell()
                    await self._due.wait()
                    while True:
                        self._due.clear()
                        await self._seek(self._interfaces())
                        await self._next()
                finally:
                    # Whoever calls from now on finds nobody; what is open ends with its task.
                    self._tasks = None
                    if self._port is not None:
                        self._port.forget(self._tag)
        finally:
            # Of a link whose task was cancelled before it began.
            for link in self.links:
                await link.close()

    async def _next(self) -> None:
        """Wait until another round is due: asked for, or a while after one that failed, if messages flow."""
        await asyncio.sleep(PAUSE_S)
        while not self._due.is_set():
            before = self._traffic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S):
                    await self._due.wait()
            if self._traffic() != before and not self.links:
                return

    # ------------------------------------------------------------ where we listen

    async def _tell(self) -> None:
        if self._port is None or self._interfaces is None:
            return
        interfaces = self._interfaces()
        addresses = await self._port.addresses(
            interfaces if self._neighbours else public_interfaces(interfaces)
        )
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._port.forget(self._tag)
        self._tag = socket_tag(self._further, ticket)
        self._seen.clear()
        self._port.expect(self._tag, lambda *hello: self._called(ticket, *hello))
        self._send(Listening(ticket.hex(), [str(address) for address in addresses]))

    def _called(self, ticket: bytes, nonce: bytes, hello: bytes, transport: asyncio.Transport) -> bool:
        if self._tasks is None or nonce in self._seen or len(self._seen) >= MAX_HELLOS:
            return False
        link = SocketLink(
            socket_keys(self._further, ticket, nonce, dialling=False), self._on_frame, self._on_room
        )
        # `hello` begins with the tag: the length before it was checked.
        if not link.welcome(transport, hello):
            return False
        self._seen.add(nonce)
        self._adopt(link)
        return True

    # ------------------------------------------------------------ where they listen

    async def _seek(self, interfaces: frozenset[Interface]) -> None:
        """One round of tries, unless there is a socket."""
        if not self._dialled and self._port is not None:
            await asyncio.sleep(SECOND_S)
        theirs = self._theirs
        if theirs is None or self.links:
            return
        addresses = worth_trying(theirs.addresses, interfaces)
        if not await self._round(addresses, bytes.fromhex(theirs.ticket)):
            self.why_none = _why(theirs, addresses)

    async def _round(self, addresses: Sequence[Address], ticket: bytes) -> bool:
        """Try the addresses, each soon after the one before it; the first that leads to our peer ends it."""
        found = asyncio.Event()

        async def attempt(address: Address) -> None:
            try:
                link = await dial(address, self._further, ticket, self._on_frame, self._on_room)
            except ConnectionLost as error:
                log.info("no socket to %s", error)
                return
            found.set()
            self._adopt(link)

        async with self._limit, asyncio.TaskGroup() as attempts:
            running: set[asyncio.Task[None]] = set()
            for address in addresses:
                running.add(attempts.create_task(attempt(address)))
                await asyncio.wait(running, timeout=STAGGER_S, return_when=asyncio.FIRST_COMPLETED)
                if found.is_set():
                    break
                running = {each for each in running if not each.done()}
            while running and not found.is_set():
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for each in running:
                each.cancel()
        return found.is_set()

    # ------------------------------------------------------------ the life of one

    def _adopt(self, link: SocketLink) -> None:
        assert self._tasks is not None
        if len(self.links) >= MAX_SOCKETS:
            self.links[0].lost.set()
        self.links.append(link)
        self._tasks.create_task(self._live(link))

    async def _live(self, link: SocketLink) -> None:
        try:
            self._use(link)
            await link.lost.wait()
        finally:
            self.links.remove(link)
            self.why_none = LOST
            self._drop(link)
            await link.close()
        before = self._traffic()
        await asyncio.sleep(RETRY_LOST_S)
        if self._traffic() != before:
            self._due.set()


def _why(theirs: Listening, tried: Sequence[Address]) -> str:
    if len(tried) == 1:
        return "its address does not answer"
    if tried:
        return f"none of its {len(tried)} addresses answers"
    return NOT_OURS if theirs.addresses else NO_PORT
