"""DTLS records in and out, many at a time.

aiortc's handshake is kept. After it, records no longer pass through a queue and a task for each of them: they
are decrypted where they are read, and what leaves is encrypted back to back and sent in one call.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Protocol, cast

from aiortc import RTCDtlsParameters, RTCDtlsTransport
from OpenSSL import SSL

from shared.channel.fast.datagrams import MAX_SEGMENTS, MAX_SEND_BYTES, Address, Port, Reader, records_of

log = logging.getLogger(__name__)

# The longest record (RFC 6347 §4.1).
MAX_RECORD_BYTES = 16384
# Header, explicit nonce and mark of AES-GCM, with room to spare for other ciphers.
RECORD_OVERHEAD_BYTES = 64
_HEADER_BYTES = 13
# Its successor writes records without a length, so joined ones could not be told apart.
_VERSION = "DTLSv1.2"


class PacketReceiver(Protocol):
    """Who takes what was decrypted. Does not raise."""

    def packet_received(self, packet: bytes) -> None: ...

    def batch_received(self) -> None: ...


class FastDtlsTransport(RTCDtlsTransport, Reader):
    """aiortc's DTLS with a short way for records, once the handshake is done.

    Without a `Port` before its socket, or with another version of DTLS, it is aiortc's in all.
    """

    _port: Port | None = None
    _remote: Address = ("", 0)

    async def start(self, remoteParameters: RTCDtlsParameters) -> None:  # noqa: N803 - aiortc's name
        await super().start(remoteParameters)
        if self.state == "connected":
            self._take_over()

    @property
    def wide(self) -> bool:
        """Whether the system granted buffers for a megabyte on its way."""
        return self._port is not None and self._port.wide

    def drain(self) -> None:
        """Hear what lies in the socket already."""
        if self._port is not None:
            self._port.drain()

    def send_packets(self, packets: Sequence[bytes]) -> None:
        """Encrypt and send SCTP packets. One that cannot leave is lost, as on the way."""
        if self.state != "connected" or self._ssl is None:
            return
        place = 0
        while place < len(packets):
            place = self._send_alike(packets, place)

    def cut_datagrams(self, allowed: bool) -> bool:
        """Whether datagrams may be cut on their way; False when this system has no such choice."""
        return self._port is not None and self._port.cut_datagrams(allowed)

    def send_probe(self, packet: bytes) -> bool:
        """Send one packet of any length; False when it is longer than our own network takes."""
        if self.state != "connected" or self._ssl is None or self._port is None:
            return False
        try:
            self._ssl.send(packet)
            record = self._ssl.bio_read(len(packet) + RECORD_OVERHEAD_BYTES)
        except SSL.Error:
            return False
        return self._port.send_probe(record, self._address(self._port))

    def _send_alike(self, packets: Sequence[bytes], start: int) -> int:
        """Send from `start` on what the kernel can cut: packets of one length, then perhaps a shorter one."""
        assert self._ssl is not None
        size = len(packets[start])
        most = max(1, min(MAX_SEGMENTS, MAX_SEND_BYTES // (size + RECORD_OVERHEAD_BYTES)))
        end = start
        try:
            while end < len(packets) and end - start < most and len(packets[end]) <= size:
                self._ssl.send(packets[end])
                end += 1
                if len(packets[end - 1]) < size:
                    break
            self._send_records(self._ssl.bio_read((end - start) * (size + RECORD_OVERHEAD_BYTES)))
        except (SSL.Error, OSError) as error:
            log.debug("a packet did not leave: %s", error)
            return max(end, start + 1)
        return end

    def _send_records(self, records: bytes) -> None:
        record_bytes = _HEADER_BYTES + (records[11] << 8 | records[12])
        if self._port is not None:
            self._port.send(records, record_bytes, self._address(self._port))
        elif (pair := self.transport._connection._nominated.get(1)) is not None:
            for place in range(0, len(records), record_bytes):
                pair.protocol.transport.sendto(records[place : place + record_bytes], pair.remote_addr)

    def _address(self, port: Port) -> Address:
        """Where the other side is: what ICE agrees on now, or did when the records began."""
        return port.nominated() or self._remote

    # Reader: what the port calls.

    def records(self, records: bytes, count: int) -> None:
        ssl, receiver = self._ssl, cast(PacketReceiver | None, self._data_receiver)
        assert ssl is not None
        ssl.bio_write(records)
        # As many tries as records, whatever each of them was, so that none is left for the next time.
        for _ in range(count):
            try:
                packet = ssl.recv(MAX_RECORD_BYTES)
            except SSL.ZeroReturnError:
                self._closed_by_remote()
                return
            except SSL.Error:
                # Forged, repeated, or of a handshake whose end the other side did not hear: we say it again.
                self._flush()
            else:
                if receiver is not None:
                    receiver.packet_received(packet)

    def drained(self) -> None:
        if self._data_receiver is not None:
            cast(PacketReceiver, self._data_receiver).batch_received()

    def _take_over(self) -> None:
        assert self._ssl is not None
        pair = self.transport._connection._nominated.get(1)
        port = pair.protocol.transport.get_protocol() if pair is not None else None
        if pair is not None and isinstance(port, Port) and self._ssl.get_protocol_version_name() == _VERSION:
            self._port, self._remote = port, pair.remote_addr
            port.feed(self)

    async def _write_ssl(self) -> None:
        # aiortc's own takes 1500 bytes and leaves the rest to spoil what is sent next.
        if self._port is None:
            await super()._write_ssl()
        else:
            self._flush()

    def _flush(self) -> None:
        """Send whatever OpenSSL has to say by itself, record by record."""
        assert self._ssl is not None
        with contextlib.suppress(SSL.Error, OSError):
            for record in records_of(self._ssl.bio_read(2 * MAX_SEND_BYTES)):
                self._send_records(record)

    def _closed_by_remote(self) -> None:
        """Ends aiortc's reading task as a lost socket does, which closes this transport."""
        pair = self.transport._connection._nominated.get(1)
        if pair is not None:
            self.transport._connection.protocol_lost(pair.protocol)
