"""Messages as frames: a 16-byte header, JSON meta, raw bytes. Pure: bytes in, bytes out.

A message is its meta followed by its body. It is cut into frames that every path can carry, so a frame that
was meant for one path can be sent again on another. Who sends which frame when is the channel's business.
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from shared.errors import ProtocolError
from shared.protocol import MAX_BODY_BYTES, MAX_CHUNK_BYTES, MAX_META_BYTES

CHUNK_BYTES = 16 * 1024
"""Urgent frames pass between the chunks of a long message, so a chunk bounds how long they wait."""
LONG_CHUNK_BYTES = MAX_CHUNK_BYTES
"""On streams of bytes, where a frame costs the same whatever its length: by a relay or a socket."""
WHOLE_BYTES = 60 * 1024
"""An urgent message up to this is not cut: hidden states of one position would rarely gain from it."""

SEQUENCE_MASK = 0xFFFF_FFFF
MAX_OPEN_MESSAGES = 4
"""Messages of one channel that may be half received at once. We send at most one per priority."""
MAX_OPEN_BYTES = MAX_META_BYTES + MAX_BODY_BYTES

HEADER = Struct("<BBHIII")
HEADER_BYTES = HEADER.size

CHANNEL_WIRE = 0
PEER_WIRE = 1

FIRST = 1
LAST = 2
WHOLE = FIRST | LAST
ABANDONED = 4
"""The sender gave up this message half way: forget what came of it."""
PRIORITY_SHIFT = 4

_LAZY_BYTES = 1 << 20


class Priority(IntEnum):
    """Frames of a lower number pass those of a higher one; within one priority, messages stay in order."""

    CONTROL = 0
    DECODE = 1
    PREFILL = 2
    BACKGROUND = 3


class Header(NamedTuple):
    """The first 16 bytes of a frame. The lengths are those of the whole message, told by its first frame."""

    kind: int
    flags: int
    stream: int
    sequence: int
    meta_bytes: int
    body_bytes: int


class Message(NamedTuple):
    """A message as it arrived: JSON, then numbers. The views keep their memory alive."""

    meta: memoryview
    body: memoryview


def aligned(meta: bytes) -> bytes:
    """Meta followed by blanks, so that the body starts on a multiple of 16 and can be used where it lies."""
    return meta + b" " * (-len(meta) % 16)


def whole_frame(
    kind: int,
    priority: int,
    sequence: int,
    meta: bytes,
    body: bytes | bytearray | memoryview = b"",
    stream: int = 0,
) -> bytes:
    """A message that fits in one frame: the one copy that it needs."""
    flags = WHOLE | priority << PRIORITY_SHIFT
    header = HEADER.pack(kind, flags, stream, sequence & SEQUENCE_MASK, len(meta), len(body))
    return b"".join((header, meta, body))


class Splitter:
    """Cuts one message into frames, each made when it is asked for. The body is not copied before that."""

    __slots__ = ("_body", "_meta", "_position", "_total", "priority", "stream")

    def __init__(self, meta: bytes, body: memoryview, priority: Priority, stream: int) -> None:
        if not 0 < len(meta) <= MAX_META_BYTES or len(body) > MAX_BODY_BYTES:
            raise ProtocolError(
                f"a message of {len(meta)} + {len(body)} bytes is longer than the protocol allows"
            )
        self._meta = meta
        self._body = body
        self._position = 0
        self._total = len(meta) + len(body)
        self.priority = priority
        self.stream = stream

    @property
    def started(self) -> bool:
        return self._position > 0

    @property
    def finished(self) -> bool:
        return self._position >= self._total

    def next_bytes(self, chunk_bytes: int = CHUNK_BYTES) -> int:
        """The length of the frame that `take` would give."""
        return HEADER_BYTES + min(chunk_bytes, self._total - self._position)

    def take(self, sequence: int, chunk_bytes: int = CHUNK_BYTES) -> bytes:
        """The next frame, with at most `chunk_bytes` of the message."""
        start, end = self._position, min(self._position + chunk_bytes, self._total)
        self._position = end
        flags = self.priority << PRIORITY_SHIFT | (LAST if end == self._total else 0)
        meta_bytes = len(self._meta)
        lengths = (0, 0)
        if start == 0:
            flags |= FIRST
            lengths = (meta_bytes, len(self._body))
        header = HEADER.pack(PEER_WIRE, flags, self.stream, sequence & SEQUENCE_MASK, *lengths)
        body = self._body[max(start - meta_bytes, 0) : max(end - meta_bytes, 0)]
        return b"".join((header, self._meta[start:end], body))

    def abandon(self, sequence: int) -> bytes:
        """A frame that tells the receiver to forget this message."""
        self._position = self._total
        flags = ABANDONED | self.priority << PRIORITY_SHIFT
        return HEADER.pack(PEER_WIRE, flags, self.stream, sequence & SEQUENCE_MASK, 0, 0)


def read_header(frame: bytes | memoryview) -> Header:
    """The header of a frame whose length agrees with it. Raises ProtocolError for anything else."""
    size = len(frame) - HEADER_BYTES
    if not 0 <= size <= MAX_CHUNK_BYTES:
        raise ProtocolError(
            f"a frame of {len(frame)} bytes is not between {HEADER_BYTES} and the longest allowed"
        )
    header = Header._make(HEADER.unpack_from(frame))
    kind, flags, stream, _, meta_bytes, body_bytes = header
    parts = flags & 0x0F
    if (
        kind > PEER_WIRE
        or flags >> PRIORITY_SHIFT > Priority.BACKGROUND
        or parts not in (0, FIRST, LAST, WHOLE, ABANDONED)
    ):
        raise ProtocolError(f"a frame has kind {kind} and flags {flags:#x}, which mean nothing")
    if parts & FIRST:
        if not 0 < meta_bytes <= MAX_META_BYTES or body_bytes > MAX_BODY_BYTES:
            raise ProtocolError(
                f"a message of {meta_bytes} + {body_bytes} bytes is announced, which is not allowed"
            )
        if not (size == meta_bytes + body_bytes if parts & LAST else 0 < size < meta_bytes + body_bytes):
            raise ProtocolError("the first frame of a message has not the length that its header tells")
    elif meta_bytes or body_bytes or (parts == ABANDONED) != (size == 0):
        raise ProtocolError("a later frame of a message has a header or length that belongs elsewhere")
    if kind == CHANNEL_WIRE and (parts != WHOLE or stream or body_bytes):
        raise ProtocolError("a channel message came in parts or with a body")
    return header


class _Open:
    """A message half received: its memory was set aside whole when its first frame came."""

    __slots__ = ("body", "body_filled", "meta", "meta_filled")

    def __init__(self, meta_bytes: int, body_bytes: int) -> None:
        self.meta = memoryview(bytearray(meta_bytes))
        self.body = _memory(body_bytes)
        self.meta_filled = 0
        self.body_filled = 0

    @property
    def bytes(self) -> int:
        return len(self.meta) + len(self.body)

    @property
    def missing(self) -> int:
        return self.bytes - self.meta_filled - self.body_filled

    def fill(self, part: memoryview) -> None:
        head = min(len(part), len(self.meta) - self.meta_filled)
        if head:
            self.meta[self.meta_filled : self.meta_filled + head] = part[:head]
            self.meta_filled += head
        if tail := len(part) - head:
            self.body[self.body_filled : self.body_filled + tail] = part[head:]
            self.body_filled += tail


class Joiner:
    """Puts frames, given in the order of their sequence, together to messages.

    The memory it may hold is checked before it is taken: `MAX_OPEN_MESSAGES`, `MAX_OPEN_BYTES`.
    """

    def __init__(self) -> None:
        self._open: dict[int, _Open] = {}
        self._open_bytes = 0

    def push(self, header: Header, frame: bytes | memoryview) -> Message | None:
        """Add one frame of the peer wire; the message, when this was its last. Raises ProtocolError."""
        parts = header.flags & 0x0F
        if parts == WHOLE and header.stream not in self._open:
            view = memoryview(frame)
            end = HEADER_BYTES + header.meta_bytes
            return Message(view[HEADER_BYTES:end], view[end:])
        if parts & FIRST:
            message = self._begin(header)
        else:
            known = self._open.get(header.stream)
            if known is None:
                raise ProtocolError(f"stream {header.stream} goes on without having begun")
            message = known
        if parts == ABANDONED:
            self._forget(header.stream)
            return None
        part = memoryview(frame)[HEADER_BYTES:]
        left = message.missing - len(part)
        if left < 0 or (left == 0) != bool(parts & LAST):
            raise ProtocolError(f"the message on stream {header.stream} has not the length that it announced")
        message.fill(part)
        if left:
            return None
        self._forget(header.stream)
        return Message(message.meta, message.body)

    def _begin(self, header: Header) -> _Open:
        size = header.meta_bytes + header.body_bytes
        if header.stream in self._open:
            raise ProtocolError(f"stream {header.stream} begins a message inside another")
        if len(self._open) >= MAX_OPEN_MESSAGES or self._open_bytes + size > MAX_OPEN_BYTES:
            raise ProtocolError(
                f"{len(self._open)} messages of {self._open_bytes} bytes are open; no room for {size}"
            )
        message = self._open[header.stream] = _Open(header.meta_bytes, header.body_bytes)
        self._open_bytes += size
        return message

    def _forget(self, stream: int) -> None:
        self._open_bytes -= self._open.pop(stream).bytes


def _memory(size: int) -> memoryview:
    """Memory for a body, all zeros.

    A long one comes as untouched pages: announcing 256 MiB would otherwise cost us 256 MiB and a tenth of a
    second of our event loop before a byte of it has arrived.
    """
    if size < _LAZY_BYTES:
        return memoryview(bytearray(size))
    if hasattr(mmap, "MAP_PRIVATE"):
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return memoryview(mmap.mmap(-1, size))
