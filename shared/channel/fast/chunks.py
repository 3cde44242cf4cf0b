"""SCTP packets as bytes: DATA and SACK, the two chunks that come in numbers. Pure; source: RFC 9260 §3.

All other chunks are read and written by aiortc.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from google_crc32c import extend

DATA = 0
SACK = 3

# The flags of DATA.
LAST = 1
FIRST = 2
WHOLE = FIRST | LAST

COMMON_HEADER_BYTES = 12
CHUNK_HEADER_BYTES = 4
DATA_HEADER_BYTES = 16
# 1160 bytes of user data in a packet of 1188, with DTLS and UDP still within IPv6's least MTU of 1280.
PAYLOAD_BYTES = 1160
# A SACK has to fit into a packet too; what is not reported now is reported once the first gaps are closed.
MAX_GAPS = 256
MAX_DUPLICATES = 16

TSN_MASK = 0xFFFF_FFFF
_HALF = 0x8000_0000

_COMMON = Struct("!HHL")
_CHECKSUM = Struct("<L")
_CHUNK = Struct("!BBH")
_DATA = Struct("!BBHLHHL")
_DATA_BODY = Struct("!LHHL")
_SACK = Struct("!BBHLLHH")
_SACK_BODY = Struct("!LLHH")
_GAP = Struct("!HH")
_TSN = Struct("!L")
_NO_CHECKSUM = b"\0\0\0\0"
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


class Data(NamedTuple):
    """A DATA chunk: one piece of a message. `flags` tells whether it is the first, the last, or both."""

    tsn: int
    flags: int
    stream: int
    protocol: int
    payload: bytes


class Sack(NamedTuple):
    """What the other side has: all up to `cumulative`, and the offsets in `gaps`. `window` bytes more fit."""

    cumulative: int
    window: int
    gaps: list[tuple[int, int]]
    duplicates: int


def unwrapped(tsn: int, near: int) -> int:
    """The endless number whose low 32 bits are `tsn`, within 2^31 of `near`: it compares like any integer."""
    return near + ((tsn - near + _HALF) & TSN_MASK) - _HALF


class Envelope:
    """What is the same in each packet of one direction: both ports, the verification tag, and their checksum.

    The checksum goes on from the header's, so that no packet is copied for it.
    """

    def __init__(self, source_port: int, destination_port: int, tag: int) -> None:
        self._head = _COMMON.pack(source_port, destination_port, tag)
        self._head_checksum = extend(0, self._head + _NO_CHECKSUM)

    def sealed(self, chunk: bytes) -> bytes:
        """A packet with one chunk, padded already."""
        return self._head + _CHECKSUM.pack(extend(self._head_checksum, chunk)) + chunk

    def fits(self, packet: bytes) -> bool:
        """Whether a packet is of this direction and association, and unharmed."""
        if len(packet) < COMMON_HEADER_BYTES + CHUNK_HEADER_BYTES or packet[:8] != self._head:
            return False
        checksum: int = extend(self._head_checksum, packet[COMMON_HEADER_BYTES:])
        return _CHECKSUM.unpack_from(packet, 8) == (checksum,)


def data_chunk(flags: int, tsn: int, stream: int, sequence: int, protocol: int, payload: bytes) -> bytes:
    """The bytes of a DATA chunk with its padding."""
    size = DATA_HEADER_BYTES + len(payload)
    head = _DATA.pack(DATA, flags, size, tsn & TSN_MASK, stream, sequence & 0xFFFF, protocol)
    return head + payload + _PADDING[size & 3]


def read_data(flags: int, body: bytes) -> Data:
    """A DATA chunk from what follows its first four bytes. Raises ValueError when it carries nothing."""
    if len(body) <= _DATA_BODY.size:
        raise ValueError(f"a DATA chunk of {len(body)} bytes carries no user data")
    tsn, stream, _, protocol = _DATA_BODY.unpack_from(body)
    return Data(tsn, flags, stream, protocol, body[_DATA_BODY.size :])


def only_data(packet: bytes) -> Data | None:
    """The DATA chunk of a packet that has nothing else, as nearly all have: half the work of `chunks`."""
    if packet[COMMON_HEADER_BYTES] or len(packet) <= COMMON_HEADER_BYTES + DATA_HEADER_BYTES:
        return None
    _, flags, size, tsn, stream, _, protocol = _DATA.unpack_from(packet, COMMON_HEADER_BYTES)
    if size <= DATA_HEADER_BYTES or COMMON_HEADER_BYTES + size + (-size & 3) != len(packet):
        return None
    start = COMMON_HEADER_BYTES + DATA_HEADER_BYTES
    return Data(tsn, flags, stream, protocol, packet[start : COMMON_HEADER_BYTES + size])


def sack_chunk(cumulative: int, window: int, gaps: list[tuple[int, int]], duplicates: list[int]) -> bytes:
    """The bytes of a SACK chunk; all its parts are multiples of four bytes long."""
    size = CHUNK_HEADER_BYTES + _SACK_BODY.size + 4 * (len(gaps) + len(duplicates))
    head = _SACK.pack(SACK, 0, size, cumulative & TSN_MASK, window, len(gaps), len(duplicates))
    if not gaps and not duplicates:
        return head
    tail = [_GAP.pack(first, last) for first, last in gaps]
    return b"".join([head, *tail, *(_TSN.pack(tsn & TSN_MASK) for tsn in duplicates)])


def read_sack(body: bytes) -> Sack:
    """A SACK chunk from what follows its first four bytes. Raises ValueError for one that is too short."""
    if len(body) < _SACK_BODY.size:
        raise ValueError(f"a SACK chunk has only {len(body)} bytes")
    cumulative, window, gap_count, duplicates = _SACK_BODY.unpack_from(body)
    end = _SACK_BODY.size + 4 * gap_count
    if len(body) < end:
        raise ValueError(f"a SACK chunk of {len(body)} bytes claims {gap_count} gaps")
    gaps = [_GAP.unpack_from(body, place) for place in range(_SACK_BODY.size, end, 4)] if gap_count else []
    return Sack(cumulative, window, gaps, duplicates)


def chunks(packet: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and body of each chunk. Raises ValueError where a length is a lie; those before count."""
    place, size = COMMON_HEADER_BYTES, len(packet)
    while place + CHUNK_HEADER_BYTES <= size:
        kind, flags, length = _CHUNK.unpack_from(packet, place)
        if length < CHUNK_HEADER_BYTES or place + length > size:
            raise ValueError(f"a chunk of type {kind} claims {length} of {size - place} bytes")
        yield kind, flags, packet[place + CHUNK_HEADER_BYTES : place + length]
        place += length + (-length & 3)
