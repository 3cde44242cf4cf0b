"""The UDP socket below a data channel: whom to believe, reading until it is empty, sending many at once.

A `Port` stands between the socket and aioice, put there through asyncio's public `set_protocol`. STUN goes on
to aioice; DTLS counts only from the address that ICE agreed on, so nobody else can disturb a handshake or
fill a queue; everything else is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections import deque
from struct import Struct
from typing import Any, NamedTuple

from aioice import stun
from aioice.ice import Connection, StunProtocol

log = logging.getLogger(__name__)

Address = tuple[str, int]

# Linux joins and cuts datagrams in the kernel (udp(7)); elsewhere these numbers mean other things.
_OFFLOADS = sys.platform == "linux"
_UDP_SEGMENT = 103
_UDP_GRO = 104
_SEGMENT = Struct("=H")
# ip(7) and ipv6(7): whether datagrams longer than a part of the way takes are cut, by us or by routers.
_MTU_DISCOVER = {socket.AF_INET: (socket.IPPROTO_IP, 10), socket.AF_INET6: (socket.IPPROTO_IPV6, 23)}
_CUT_AS_NEEDED = 0
_NEVER_CUT = 3
MAX_SEGMENTS = 60
MAX_SEND_BYTES = 60_000

# Asked for; aioice asks for 256 KiB, which one burst of a fast sender overruns.
BUFFER_BYTES = 4 << 20
WIDE_BUFFER_BYTES = 2 << 20
# A reading holds up to 64 KiB when the kernel joins datagrams. Others wait for the loop meanwhile: some 5 ms.
READ_BYTES = 65536
BATCH_BYTES = 192 * 1024
MAX_READS = 64
# DTLS that arrives before ICE has agreed on an address: one flight of a handshake.
MAX_EARLY = 16

MAX_RUN_BYTES = 16384

_DTLS_HEADER_BYTES = 13
_STUN_HEADER_BYTES = 20


def is_stun(datagram: bytes) -> bool:
    return datagram[0] < 4


def is_dtls(datagram: bytes) -> bool:
    """By the first byte, as RFC 7983 §7 says."""
    return 19 < datagram[0] < 64


class Run(NamedTuple):
    """DTLS records that follow each other, and their number; or something else, and none."""

    data: bytes
    records: int


def runs(datagrams: bytes) -> list[Run]:
    """Cut what the kernel joined: runs of DTLS records, each STUN message alone; what is neither stays whole.

    OpenSSL reads at most 16 KiB at a time from a memory BIO and forgets what it cuts, so no run is longer.
    Fed by such runs it takes two thirds of the time that it takes record by record.
    """
    found: list[Run] = []
    start = place = records = 0
    size = len(datagrams)
    while place < size:
        first = datagrams[place]
        is_record = 19 < first < 64 and place + _DTLS_HEADER_BYTES <= size
        if is_record:
            end = place + _DTLS_HEADER_BYTES + (datagrams[place + 11] << 8 | datagrams[place + 12])
        elif first < 4 and place + _STUN_HEADER_BYTES <= size:
            end = place + _STUN_HEADER_BYTES + (datagrams[place + 2] << 8 | datagrams[place + 3])
        else:
            end = size
        if records and not (is_record and end - start <= MAX_RUN_BYTES):
            found.append(Run(datagrams[start:place], records))
            start, records = place, 0
        if is_record:
            records += 1
        else:
            found.append(Run(datagrams[place:end], 0))
            start = end
        place = end
    if records:
        found.append(Run(datagrams[start:place], records))
    return found


def records_of(run: bytes) -> list[bytes]:
    """The records of a run, one by one."""
    found, place = [], 0
    while place + _DTLS_HEADER_BYTES <= len(run):
        end = place + _DTLS_HEADER_BYTES + (run[place + 11] << 8 | run[place + 12])
        found.append(run[place:end])
        place = end
    return found


class Reader:
    """Who takes DTLS records in the fast way."""

    def records(self, records: bytes, count: int) -> None:
        """So many records that follow each other. Does not raise."""
        raise NotImplementedError

    def drained(self) -> None:
        """Nothing more lies in the socket for now. Does not raise."""
        raise NotImplementedError


class Port(asyncio.DatagramProtocol):
    """One socket of an ICE connection."""

    def __init__(self, transport: asyncio.DatagramTransport, stun_protocol: StunProtocol) -> None:
        self.wide = False
        """Whether the system granted buffers for a megabyte on its way."""
        self._transport = transport
        self._stun = stun_protocol
        self._reader: Reader | None = None
        self._raw: socket.socket | None = None
        self._segments = False
        self._early: deque[tuple[bytes, Address]] = deque(maxlen=MAX_EARLY)

    # What asyncio calls.

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        """The first datagram comes from the event loop, which would wake up again for each of the others."""
        self._hear(data, addr)
        if self._reader is not None:
            self.drain()

    def error_received(self, exc: Exception) -> None:
        self._stun.error_received(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self._reader = None
        if self._raw is not None:
            self._raw.close()
            self._raw = None
        self._stun.connection_lost(exc)

    # Whom to believe.

    def nominated(self) -> Address | None:
        """The address that ICE agreed on, if it is to be reached through this socket."""
        pair = self._stun.receiver._nominated.get(1)
        return pair.remote_addr if pair is not None and pair.protocol is self._stun else None

    def believed(self, address: Address) -> bool:
        """Whether ICE knows the other side by this address, on this socket.

        It may send by another pair than the one agreed on: Chromium changes over while packets are late.
        """
        if address == self.nominated():
            return True
        pairs = self._stun.receiver._check_list
        return any(pair.protocol is self._stun and pair.remote_addr == address for pair in pairs)

    def release(self) -> None:
        """ICE has agreed on an address: what came from it early is heard now, the rest never."""
        early, self._early = list(self._early), deque(maxlen=MAX_EARLY)
        for data, address in early:
            self._dtls(data, address)

    def _hear(self, data: bytes, addr: tuple[Any, ...]) -> None:
        try:
            self._sort(data, addr)
        except Exception as error:
            # Whatever a stranger sent, and whatever broke: the datagrams after it are heard.
            context = {"message": f"a datagram from {addr[0]} was not understood", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    def _sort(self, data: bytes, addr: tuple[Any, ...]) -> None:
        if not data:
            return
        # An IPv6 address has four parts, of which aioice knows two.
        address = (addr[0], addr[1])
        if self._reader is None:
            self._sort_one(data, address)
            return
        if self.believed(address):
            reader = self._reader
            for run in runs(data):
                if run.records:
                    reader.records(run.data, run.records)
                else:
                    self._sort_one(run.data, address)
        else:
            self._sort_one(data, address)

    def _sort_one(self, data: bytes, address: Address) -> None:
        if is_dtls(data):
            self._dtls(data, address)
        elif is_stun(data):
            # aioice would queue what it cannot parse as if it were data, without end.
            with contextlib.suppress(ValueError):
                stun.parse_message(data)
                self._stun.datagram_received(data, address)

    def _dtls(self, data: bytes, address: Address) -> None:
        connection = self._stun.receiver
        if not connection._nominated:
            self._early.append((data, address))
        elif self.believed(address):
            connection.data_received(data, 1)

    # The fast way.

    def feed(self, reader: Reader) -> None:
        """From now on records go to `reader`. Takes what the system grants of buffers and offloads."""
        self._reader = reader
        with contextlib.suppress(OSError, AttributeError):
            self._raw = _second_handle(self._transport)
            self.wide = _widened(self._raw)
            if _OFFLOADS:
                self._raw.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
                self._raw.getsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT)
                self._segments = True

    def drain(self) -> None:
        """Read until the socket is empty, then say so: one wake-up and one SACK for all of it."""
        heard_bytes = reads = 0
        while self._raw is not None and heard_bytes < BATCH_BYTES and reads < MAX_READS:
            try:
                data, addr = self._raw.recvfrom(READ_BYTES)
            except OSError:
                break
            heard_bytes += len(data)
            reads += 1
            self._hear(data, addr)
        if self._reader is not None:
            self._reader.drained()

    def cut_datagrams(self, allowed: bool) -> bool:
        """Whether datagrams may be cut on their way; False when this system has no such choice."""
        if self._raw is None or not _OFFLOADS:
            return False
        with contextlib.suppress(OSError):
            self._raw.setsockopt(*_MTU_DISCOVER[self._raw.family], _CUT_AS_NEEDED if allowed else _NEVER_CUT)
            return True
        return False

    def send_probe(self, record: bytes, address: Address) -> bool:
        """Send one record; False when it is longer than our own network takes."""
        if self._raw is None:
            return False
        try:
            self._raw.sendto(record, address)
        except BlockingIOError:
            # As good as lost on the way.
            return True
        except OSError:
            return False
        return True

    def send(self, records: bytes, record_bytes: int, address: Address) -> None:
        """Send records that follow each other, each `record_bytes` long, the last one perhaps shorter."""
        if self._transport.is_closing():
            return
        if self._segments and self._raw is not None and len(records) > record_bytes:
            cut = [(socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT.pack(record_bytes))]
            try:
                self._raw.sendmsg([records], cut, 0, address)
                return
            except BlockingIOError:
                # The event loop's own way waits until there is room.
                pass
            except OSError as error:
                log.info("the system does not cut datagrams here (%s): sent one by one", error)
                self._segments = False
        for place in range(0, len(records), record_bytes):
            self._transport.sendto(records[place : place + record_bytes], address)


def stand_before(connection: Connection) -> list[Port]:
    """Put a port before each socket of an ICE connection that has gathered its candidates."""
    ports = []
    for stun_protocol in connection._protocols:
        transport = stun_protocol.transport
        if transport.get_extra_info("socket") is not None:
            ports.append(Port(transport, stun_protocol))
            transport.set_protocol(ports[-1])
    return ports


def _second_handle(transport: asyncio.DatagramTransport) -> socket.socket:
    """The same socket as asyncio's: asyncio has no way to read more, or to send with control messages.

    Raises OSError on Windows, whose sockets are no files.
    """
    raw = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
    raw.setblocking(False)
    return raw


def _widened(raw: socket.socket) -> bool:
    """Ask for larger buffers; whether we got enough. Linux tells twice what it grants."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        raw.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    granted = min(
        raw.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_RCVBUF, socket.SO_SNDBUF)
    )
    return granted >= (2 if _OFFLOADS else 1) * WIDE_BUFFER_BYTES
