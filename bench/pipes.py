"""Ways between two processes that `bench.wire` compares: each sends messages of any length and hears them.

`tcp` is raw asyncio TCP, the yardstick, and `forwarded` the same through a third process that only passes
bytes on, which is what any relay costs; `stock` is aiortc as it comes, `fast` is our data channel; `relayed`
and `socket` are whole channels, with credit, numbers and seal, by a relay and by a socket of their own.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from typing import Literal, cast

import msgspec

from shared.channel import Channel, Dialer, Listen, Priority, webrtc
from shared.channel.webrtc import DirectLink, Transports, new_certificate
from shared.identity import Identity, PeerId
from shared.protocol import Describe, Path, PeerMessage, Step, Tensor
from shared.relay_client import RelayClient

Kind = Literal["tcp", "forwarded", "stock", "fast", "relayed", "socket", "channel"]

PIECE_BYTES = 16 * 1024
BUFFER_BYTES = 1 << 20
DIRECT_TIMEOUT_S = 15.0
_LENGTH = struct.Struct("<I")
_PORT = struct.Struct("<H")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where one end is, and what it needs to meet the other."""

    listens: bool
    """This end listens and answers; the other one calls and measures."""
    address: str
    """The listening end's."""
    relay: str = ""
    forwarder: int = 0
    """Where on this machine bytes are passed on."""


class Pipe(ABC):
    """One way to the other process. `on_message` gets each message; within it, `reply` sends one back."""

    on_message: Callable[[bytes | memoryview], None]

    @abstractmethod
    async def open(self, control: Connection, place: Place) -> None:
        """Meet the other end; `control` passes on what a person would: ports, ids, descriptions."""

    @abstractmethod
    async def send(self, message: bytes, *, urgent: bool = True) -> None:
        """Hand over a message, waiting while the way is full."""

    @abstractmethod
    def reply(self, message: bytes) -> None:
        """Hand over a message at once, from within `on_message`."""

    @abstractmethod
    async def close(self) -> None: ...


def make_pipe(kind: Kind) -> Pipe:
    match kind:
        case "tcp":
            return TcpPipe()
        case "forwarded":
            return ForwardedPipe()
        case "stock":
            return DirectPipe(webrtc.PLAIN)
        case "fast":
            return DirectPipe(webrtc.best_transports())
        case "relayed" | "socket" | "channel":
            return ChannelPipe(kind)


async def _receive(control: Connection) -> bytes:
    return await asyncio.to_thread(control.recv_bytes)


# ---------------------------------------------------------------- raw TCP


class TcpPipe(Pipe, asyncio.BufferedProtocol):
    """Raw asyncio TCP with a length before each message, read into one buffer."""

    def __init__(self) -> None:
        self._connected = asyncio.Event()
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._room = asyncio.Event()
        self._room.set()

    async def open(self, control: Connection, place: Place) -> None:
        loop = asyncio.get_running_loop()
        if place.listens:
            listening = await loop.create_server(lambda: self, place.address, 0)
            control.send_bytes(str(listening.sockets[0].getsockname()[1]).encode())
            await self._connected.wait()
            listening.close()
        else:
            port = int(await _receive(control))
            await self._dial(place, port)

    async def _dial(self, place: Place, port: int) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, place.address, port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connected.set()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        place = 0
        while self._filled - place >= _LENGTH.size:
            end = place + _LENGTH.size + _LENGTH.unpack_from(self._buffer, place)[0]
            if end > self._filled:
                break
            self.on_message(bytes(self._view[place + _LENGTH.size : end]))
            place = end
        if place:
            rest = self._filled - place
            self._view[:rest] = bytes(self._view[place : self._filled])
            self._filled = rest

    async def send(self, message: bytes, *, urgent: bool = True) -> None:
        await self._room.wait()
        self.reply(message)

    def reply(self, message: bytes) -> None:
        self._transport.writelines([_LENGTH.pack(len(message)), message])

    async def close(self) -> None:
        self._transport.close()


class ForwardedPipe(TcpPipe):
    """The same by way of a `Forwarder`, which is told first where to go on to."""

    async def _dial(self, place: Place, port: int) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, place.address, place.forwarder)
        self._transport.write(_PORT.pack(port))


class Forwarder(asyncio.Protocol):
    """Passes bytes on as they come, and does nothing else: one for each end of a way."""

    def __init__(self, host: str, other: Forwarder | None = None) -> None:
        self._host = host
        self._other = other
        self._early = b""
        self._dialling: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._other is not None:
            self._other._transport.write(data)
            return
        self._early += data
        if self._dialling is None:
            self._dialling = asyncio.create_task(self._go_on())

    async def _go_on(self) -> None:
        (port,) = _PORT.unpack_from(self._early)
        _, self._other = await asyncio.get_running_loop().create_connection(
            lambda: Forwarder(self._host, self), self._host, port
        )
        self._other._transport.write(self._early[_PORT.size :])

    # The side that reads waits for the side that writes.

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None:
            self._other._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._other is not None:
            self._other._transport.close()


# ---------------------------------------------------------------- a bare data channel


class DirectPipe(Pipe):
    """A direct link. Messages longer than a frame travel as several, since that is how a channel uses it."""

    def __init__(self, transports: Transports) -> None:
        self._transports = transports
        self._room = asyncio.Event()
        self._parts: list[bytes] = []
        self._missing = 0
        self._link: DirectLink

    async def open(self, control: Connection, place: Place) -> None:
        self._link = DirectLink(
            new_certificate(),
            not place.listens,
            None,
            self._frame,
            self._room.set,
            transports=self._transports,
        )
        control.send_bytes(msgspec.json.encode(await self._link.describe(1)))
        await self._link.open(msgspec.json.decode(await _receive(control), type=Describe))

    async def send(self, message: bytes, *, urgent: bool = True) -> None:
        while not self._link.ready:
            self._room.clear()
            await self._room.wait()
        self.reply(message)
        await asyncio.sleep(0)

    def reply(self, message: bytes) -> None:
        self._link.send(_LENGTH.pack(len(message)) + message[:PIECE_BYTES])
        for start in range(PIECE_BYTES, len(message), PIECE_BYTES):
            self._link.send(message[start : start + PIECE_BYTES])

    def _frame(self, _: object, frame: bytes) -> None:
        if self._missing == 0:
            (self._missing,) = _LENGTH.unpack_from(frame)
            frame = frame[_LENGTH.size :]
        self._missing -= len(frame)
        self._parts.append(frame)
        if self._missing == 0:
            message = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts = []
            self.on_message(message)

    async def close(self) -> None:
        await self._link.close()


# ---------------------------------------------------------------- a whole channel


class ChannelPipe(Pipe):
    """A channel as sessions use it: steps with a tensor, in two priorities."""

    def __init__(self, kind: Literal["relayed", "socket", "channel"]) -> None:
        self._kind = kind
        self._stack = AsyncExitStack()
        self._replies: list[bytes] = []
        self._channel: Channel

    async def open(self, control: Connection, place: Place) -> None:
        identity = Identity.generate()
        relay = await self._stack.enter_async_context(RelayClient(place.relay, identity))
        listens = self._kind == "socket" and place.listens
        dialer = await self._stack.enter_async_context(
            Dialer(
                identity,
                relay,
                self._handle,
                direct=self._kind != "relayed",
                listen=Listen(place.address) if listens else None,
            )
        )
        control.send_bytes(identity.id.encode())
        other = PeerId((await _receive(control)).decode())
        if not place.listens:
            self._channel = await dialer.channel(other)
            await self.send(b"hello")
        wanted = {"relayed": "relayed", "socket": "socket", "channel": "data channel"}[self._kind]
        async with asyncio.timeout(DIRECT_TIMEOUT_S):
            # Nobody tells of a change of path; both ends look.
            while other not in dialer.channels or dialer.channels[other].report().kind != wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        self._channel = dialer.channels[other]

    async def send(self, message: bytes, *, urgent: bool = True) -> None:
        priority = Priority.DECODE if urgent else Priority.PREFILL
        await self._channel.send(_step(len(message)), message, priority)

    def reply(self, message: bytes) -> None:
        self._replies.append(message)

    def _handle(
        self, channel: Channel, message: PeerMessage, body: memoryview, path: Path
    ) -> Awaitable[None] | None:
        if bytes(body[:5]) != b"hello":
            self.on_message(body)
        return self._send_replies(channel) if self._replies else None

    async def _send_replies(self, channel: Channel) -> None:
        while self._replies:
            reply = self._replies.pop(0)
            await channel.send(_step(len(reply)), reply, Priority.DECODE)

    async def close(self) -> None:
        await self._stack.aclose()


def _step(size: int) -> Step:
    return Step(session="5e" * 16, epoch=1, position=0, count=1, tensor=Tensor("bfloat16", [1, size // 2]))
