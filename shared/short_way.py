"""A short way for the binary messages of a WebSocket: handed over where they are read, written as they are.

aiohttp gives each message a place in a queue, a future, and a turn of the reader's task, which costs a relay
more than all that it does with a frame. A `ShortWay` stands before aiohttp's parser and takes whole binary
messages (RFC 6455 §5.2); text, pings, fragments and the end go on to aiohttp, and so does everything that
follows a message which the reader's task has not handled yet: the order stays. `server_frame` and
`ClientWriter` make whole messages for the transport, with one copy instead of four.

It leans on three private names of aiohttp, `_payload_parser`, `_conn` and `websocket_mask`. Where one is
missing, all messages go the long way.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from functools import cache
from struct import Struct
from typing import Any, Protocol

import aiohttp

log = logging.getLogger(__name__)

Take = Callable[[memoryview], bool]
"""Takes the payload of a binary message, or returns False to have it sent the long way. Must not raise."""
Mask = Callable[[bytes, bytearray], None]
"""Combines bytes with a key of four, in place; twice gives back what was there."""

TEXT = 0x81
BINARY = 0x82

_FIN = 0x80
_OPCODE = 0x0F
_FIRST_CONTROL = 8
_MASKED = 0x80
_LENGTH_16 = Struct("!H")
_LENGTH_64 = Struct("!Q")
_HEAD_16 = Struct("!BBH")
_HEAD_64 = Struct("!BBQ")
_MASK_BYTES = 4
# What a message may be to go the short way. Longer ones are rare, and aiohttp has the limits for them.
_LONGEST_BYTES = 1 << 20


class Parser(Protocol):
    """aiohttp's own reader of WebSocket frames."""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]: ...

    def feed_eof(self) -> None: ...


class ShortWay:
    """Stands before the parser of one connection. `masked` says that what comes in was sent by a client."""

    __slots__ = ("_behind", "_missing", "_parser", "_parts", "_passing", "_size", "_unmask", "take")

    def __init__(self, parser: Parser, take: Take, unmask: Mask | None) -> None:
        self.take = take
        self._parser = parser
        self._unmask = unmask
        self._behind = 0
        """Messages that went the long way and are not handled yet."""
        self._passing = 0
        """Bytes to come that belong to a frame on the long way."""
        self._parts: list[bytes] = []
        """The beginning of a frame."""
        self._size = 0
        self._missing = 0
        """How long `_parts` must be before it is worth looking again."""

    def handled(self) -> None:
        """The reader's task is done with a message that came the long way."""
        self._behind -= 1

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take what was read. Returns what aiohttp's parser does: whether it failed, and what is left."""
        if self._parts:
            self._parts.append(data)
            self._size += len(data)
            if self._size < self._missing:
                return False, b""
            data = b"".join(self._parts)
            self._parts.clear()
        place, size = 0, len(data)
        while place < size:
            if not self._passing:
                frame = _frame_at(data, place)
                if frame is None:
                    return self._wait_for(data[place:], size - place + 1)
                payload_at, end = frame
                if self._is_short(data[place], data[place + 1], end - payload_at):
                    if end > size:
                        return self._wait_for(data[place:], end - place)
                    if self._took(data, payload_at, end):
                        place = end
                        continue
                self._behind += data[place] & _FIN != 0 and data[place] & _OPCODE < _FIRST_CONTROL
                self._passing = end - place
            part = data[place : place + self._passing]
            self._passing -= len(part)
            place += len(part)
            failed, left = self._parser.feed_data(part)
            if failed:
                return failed, left
        return False, b""

    def feed_eof(self) -> None:
        self._parser.feed_eof()

    def _is_short(self, first: int, second: int, size: int) -> bool:
        masked = second & _MASKED != 0
        return (
            first == BINARY
            and not self._behind
            and size <= _LONGEST_BYTES
            and masked == (self._unmask is not None)
        )

    def _took(self, data: bytes, start: int, end: int) -> bool:
        if self._unmask is None:
            return self.take(memoryview(data)[start:end])
        payload = bytearray(memoryview(data)[start:end])
        self._unmask(data[start - _MASK_BYTES : start], payload)
        return self.take(memoryview(payload))

    def _wait_for(self, rest: bytes, size: int) -> tuple[bool, bytes]:
        """Keep the beginning of a frame until there are `size` bytes of it."""
        self._parts.append(rest)
        self._size, self._missing = len(rest), size
        return False, b""


def shorten(protocol: object, take: Take, *, masked: bool) -> ShortWay:
    """Put a short way before the parser of an aiohttp connection, unless aiohttp is not as we know it.

    To be called when everything that was read has been handled.
    """
    parser: Any = getattr(protocol, "_payload_parser", None)
    unmask = _mask() if masked else None
    way = ShortWay(parser, take, unmask)
    if parser is None or (masked and unmask is None):
        log.info("aiohttp %s is not as we know it: frames go the long way", aiohttp.__version__)
    else:
        protocol._payload_parser = way  # type: ignore[attr-defined]
    return way


class ClientWriter:
    """Writes whole binary messages to the relay of a client's connection, past aiohttp."""

    def __init__(self, transport: asyncio.Transport, mask: Mask) -> None:
        self._transport = transport
        self._mask = mask

    def write(self, parts: Iterable[bytes | bytearray | memoryview], most_waiting: int) -> bool:
        """Write a message, unless so many bytes wait already or the connection is going: then False."""
        transport = self._transport
        if transport.get_write_buffer_size() >= most_waiting or transport.is_closing():
            return False
        # Anew for each message, and so that nobody can foresee it (RFC 6455 §5.3).
        key = secrets.token_bytes(_MASK_BYTES)
        payload = bytearray().join(parts)
        self._mask(key, payload)
        transport.writelines((_head(BINARY, len(payload), _MASKED) + key, payload))
        return True


def client_writer(socket: aiohttp.ClientWebSocketResponse) -> ClientWriter | None:
    """For a connection whose messages are not compressed; None where aiohttp is not as we know it."""
    transport = getattr(getattr(socket, "_conn", None), "transport", None)
    mask = _mask()
    if transport is None or mask is None or socket.compress:
        return None
    return ClientWriter(transport, mask)


def server_frame(kind: int, *parts: bytes | memoryview) -> bytes:
    """A whole message as a server sends it, unmasked; `kind` is TEXT or BINARY."""
    return b"".join((_head(kind, sum(map(len, parts))), *parts))


def _head(kind: int, size: int, masked: int = 0) -> bytes:
    if size < 126:
        return bytes((kind, masked | size))
    if size < 1 << 16:
        return _HEAD_16.pack(kind, masked | 126, size)
    return _HEAD_64.pack(kind, masked | 127, size)


def _frame_at(data: bytes, place: int) -> tuple[int, int] | None:
    """Where the payload of the frame that begins at `place` starts and ends; None while that is not known."""
    if len(data) < place + 2:
        return None
    length = data[place + 1] & ~_MASKED
    start = place + 2
    if length == 126:
        if len(data) < (start := start + _LENGTH_16.size):
            return None
        (length,) = _LENGTH_16.unpack_from(data, place + 2)
    elif length == 127:
        if len(data) < (start := start + _LENGTH_64.size):
            return None
        (length,) = _LENGTH_64.unpack_from(data, place + 2)
    if data[place + 1] & _MASKED:
        start += _MASK_BYTES
    return start, start + length


@cache
def _mask() -> Mask | None:
    try:
        from aiohttp._websocket.helpers import websocket_mask
    except ImportError:
        return None
    found: Any = websocket_mask
    return found  # type: ignore[no-any-return]
