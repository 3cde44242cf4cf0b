"""How long a packet the path takes, found by asking with ever shorter ones (RFC 8899 §6.2). Pure.

A home line takes a sixth more than what is safe everywhere, a network of jumbo frames seven times as much,
and each packet costs the same work. A probe is a HEARTBEAT, made longer by a PAD chunk (RFC 4820) and
forbidden to be cut on its way; its answer is short.
"""

from __future__ import annotations

from collections import deque
from struct import Struct

from shared.channel.fast.chunks import (
    CHUNK_HEADER_BYTES,
    COMMON_HEADER_BYTES,
    DATA_HEADER_BYTES,
    PAYLOAD_BYTES,
    Envelope,
)

HEARTBEAT_ACK = 5

SAFE_PACKET_BYTES = COMMON_HEADER_BYTES + DATA_HEADER_BYTES + PAYLOAD_BYTES
# With 37 bytes of DTLS, 8 of UDP and 40 of IPv6: what fits into 16 KiB (OpenSSL reads no more at a time; only
# loopback takes it), jumbo frames of 9,000 bytes, Ethernet less PPPoE, and the same less a WireGuard tunnel.
PROBED_PACKET_BYTES = (16_320, 8_912, 1_404, 1_332)
LONGEST_PACKET_BYTES = PROBED_PACKET_BYTES[0]
# An answer takes one round trip; on the longest paths a too early second probe does no harm.
PROBE_S = 0.5
PROBES = 3

_HEARTBEAT = 4
_PAD = 0x84
_INFO = 1
_CHUNK = Struct("!BBH")
_HEARTBEAT_BODY = Struct("!HHL")


class PathMtu:
    """Which length to ask for next, and which is proven. `longest` is what the other side reads at all."""

    def __init__(self, longest: int) -> None:
        self.packet_bytes = SAFE_PACKET_BYTES
        """How long a packet may be."""
        self._sizes = deque(size for size in PROBED_PACKET_BYTES if size <= longest)
        self._asked = 0

    @property
    def payload_bytes(self) -> int:
        """How much user data goes into a packet."""
        return self.packet_bytes - COMMON_HEADER_BYTES - DATA_HEADER_BYTES

    def next_probe(self) -> int | None:
        """The length to ask for now, a few times each; None when there is nothing more to find out."""
        if self._sizes and self._asked == PROBES:
            self.refused()
        self._asked += 1
        return self._sizes[0] if self._sizes else None

    def refused(self) -> None:
        """The length that was asked for does not pass, or cannot even leave."""
        self._sizes.popleft()
        self._asked = 0

    def answered(self, size: int) -> bool:
        """A probe of this length arrived; True when that is news."""
        if size not in self._sizes:
            return False
        self.packet_bytes = size
        self._sizes.clear()
        return True

    def narrowed(self) -> bool:
        """Nothing arrives any more: the path may be another one now. True when packets were long."""
        was_long = self.packet_bytes > SAFE_PACKET_BYTES
        self.packet_bytes = SAFE_PACKET_BYTES
        self._sizes.clear()
        return was_long


def probe_packet(envelope: Envelope, size: int) -> bytes:
    """A packet of `size` bytes whose answer tells that it arrived."""
    info = _CHUNK.pack(_HEARTBEAT, 0, CHUNK_HEADER_BYTES + _HEARTBEAT_BODY.size) + _HEARTBEAT_BODY.pack(
        _INFO, _HEARTBEAT_BODY.size, size
    )
    padding = size - COMMON_HEADER_BYTES - len(info)
    return envelope.sealed(info + _CHUNK.pack(_PAD, 0, padding) + bytes(padding - CHUNK_HEADER_BYTES))


def probed_size(acknowledgement: bytes) -> int:
    """Which length the body of a HEARTBEAT ACK speaks of. Raises ValueError when it is none of ours."""
    if len(acknowledgement) != _HEARTBEAT_BODY.size:
        raise ValueError(f"a HEARTBEAT ACK of {len(acknowledgement)} bytes answers nothing that was asked")
    size: int = _HEARTBEAT_BODY.unpack(acknowledgement)[2]
    return size
