"""A direct way to a peer over TCP, where one side can reach the other's port: LAN, IPv6, forwarded port.

Every frame is sealed, so the wire needs no TLS. A connection begins with the dialling side's hello: 16 random
bytes, then a first frame sealed with keys made from those, a ticket that the listening side handed out inside
the channel, and the channel's own secret. The listening side answers with a sealed hello of its own. All of
it looks like noise: plain TCP and no HTTP, so that a stranger's service that we were sent to understands
nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable
from struct import Struct

from shared.channel.addresses import Address
from shared.channel.link import Link
from shared.channel.sealed import SEAL_BYTES, Keys, socket_keys
from shared.errors import ConnectionLost
from shared.framing import HEADER_BYTES
from shared.protocol import MAX_CHUNK_BYTES

HELLO = b"corolla-socket-1"
NONCE_BYTES = 16
TICKET_BYTES = 16
LENGTH = Struct("<I")
HELLO_BYTES = NONCE_BYTES + LENGTH.size + SEAL_BYTES + len(HELLO)
TAG_AT = NONCE_BYTES + LENGTH.size
DIAL_TIMEOUT_S = 3.0

# What waits in this process. More would only make urgent frames wait.
BUFFER_BYTES = 64 * 1024
# What the kernel takes beyond what is on its way, for the same reason.
UNSENT_BYTES = 64 * 1024
_SEALED_HELLO = SEAL_BYTES + len(HELLO)
_LONGEST = SEAL_BYTES + HEADER_BYTES + MAX_CHUNK_BYTES

OnFrame = Callable[[Link, bytes], None]


class SocketLink(Link, asyncio.Protocol):
    """Sealed frames on one TCP connection. `lost` is set when it ends; `close` in any case."""

    path = "direct"
    kind = "socket"

    def __init__(self, keys: Keys, on_frame: OnFrame, on_room: Callable[[], None]) -> None:
        super().__init__()
        self.lost = asyncio.Event()
        self.greeted = asyncio.Event()
        """The other side has proven that it is the other end of the channel."""
        self._keys = keys
        self._on_frame = on_frame
        self._on_room = on_room
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        """The beginning of a frame whose end is still to come."""

    # ------------------------------------------------------------ as a link

    @property
    def ready(self) -> bool:
        transport = self._transport
        return (
            transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() < BUFFER_BYTES
        )

    def send(self, frame: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        header, sealed = self._keys.seal(frame)
        self._transport.write(b"".join((LENGTH.pack(len(header) + len(sealed)), header, sealed)))

    async def close(self) -> None:
        """End the connection; what waits in it goes nowhere."""
        self.lost.set()
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------ as a protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        # One less, so that whoever saw no room is told when there is some.
        transport.set_write_buffer_limits(high=BUFFER_BYTES - 1, low=BUFFER_BYTES // 2)
        quicken(transport)

    def welcome(self, transport: asyncio.Transport, first: bytes) -> bool:
        """The listening side: take over a connection, if its first frame is the hello of our peer."""
        if self._keys.opener(first) != HELLO:
            return False
        transport.set_protocol(self)
        self.connection_made(transport)
        self.greeted.set()
        self.send(HELLO)
        return True

    def data_received(self, data: bytes) -> None:
        came = self._rest + data if self._rest else data
        view = memoryview(came)
        start = 0
        while len(came) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(came, start)
            most = _LONGEST if self.greeted.is_set() else _SEALED_HELLO
            if not SEAL_BYTES <= length <= most:
                return self._break()
            end = start + LENGTH.size + length
            if end > len(came):
                break
            if not self._frame(view[start + LENGTH.size : end]):
                return self._break()
            start = end
        self._rest = came[start:]
        return None

    def _frame(self, sealed: memoryview) -> bool:
        """False when somebody on the way touched the stream."""
        frame = self._keys.opener(sealed)
        if frame is None or not self._keys.opener.whole:
            return False
        if self.greeted.is_set():
            self._on_frame(self, frame)
        elif frame == HELLO:
            self.greeted.set()
        else:
            return False
        return True

    def _break(self) -> None:
        self._rest = b""
        self.lost.set()
        if self._transport is not None:
            self._transport.abort()

    def resume_writing(self) -> None:
        self._on_room()

    def eof_received(self) -> None:
        self.lost.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


async def dial(
    address: Address, further: bytes, ticket: bytes, on_frame: OnFrame, on_room: Callable[[], None]
) -> SocketLink:
    """A link to whoever listens there, once it has proven to be our peer. Raises ConnectionLost."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    link = SocketLink(socket_keys(further, ticket, nonce, dialling=True), on_frame, on_room)
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: link, address.ip, address.port
            )
            transport.write(nonce)
            link.send(HELLO)
            await _first(link.greeted, link.lost)
    except (OSError, TimeoutError) as error:
        await link.close()
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ConnectionLost(f"{address}: {reason}") from None
    except BaseException:
        await link.close()
        raise
    if link.lost.is_set():
        await link.close()
        raise ConnectionLost(f"{address}: whoever listens there is not the peer")
    return link


async def _first(*events: asyncio.Event) -> None:
    """Wait for any of them."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def quicken(transport: asyncio.Transport) -> None:
    """Small frames leave at once and little waits in the kernel, where this system lets us say so."""
    theirs = transport.get_extra_info("socket")
    # A second handle on the same socket: uvloop shows us one that sets nothing.
    with socket.fromfd(theirs.fileno(), theirs.family, theirs.type) as ours:
        _quicken(ours)


def _quicken(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if hasattr(socket, "TCP_CONGESTION"):
        # BBR paces even one small message: 16 KiB there and back over 25 ms take 44 ms instead of 36.
        with contextlib.suppress(OSError):
            if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
