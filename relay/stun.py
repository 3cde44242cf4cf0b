"""Tell a participant its public UDP address: a STUN binding responder (RFC 8489, without authentication).

Beside the relay, so a self-hosted swarm needs no third party. On two ports: who is seen differently by them
is behind a symmetric NAT. On request one port answers for the other (RFC 5780 CHANGE-REQUEST, of the port
alone), which shows what a router lets in. Answers are 12 or 24 bytes longer than the shortest request, so
nobody gains from having us answer to a forged address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.errors import SettingsError

log = logging.getLogger(__name__)

BINDING_REQUEST = 0x0001
BINDING_SUCCESS = 0x0101
BINDING_ERROR = 0x0111
XOR_MAPPED_ADDRESS = 0x0020
CHANGE_REQUEST = 0x0003
ERROR_CODE = 0x0009
UNKNOWN_ATTRIBUTES = 0x000A

_COOKIE = 0x2112A442
_HEADER = struct.Struct("!HHI12s")
_ATTRIBUTE = struct.Struct("!HH")
# A binding request fits in one packet everywhere (RFC 8489 §6.1); longer ones are noise.
_LONGEST_REQUEST = 548
# Attributes below this number must be understood to answer (RFC 8489 §14).
_OPTIONAL_FROM = 0x8000
_CHANGE_PORT = bytes((0, 0, 0, 2))
# USERNAME, MESSAGE-INTEGRITY, MESSAGE-INTEGRITY-SHA256: this responder checks no one, so they change nothing.
_KNOWN = frozenset((0x0006, 0x0008, 0x001C))


def answer(packet: bytes, host: str, port: int, *, two_ports: bool = False) -> bytes | None:
    """The response to a packet from host:port, or None when it is no binding request."""
    if not _HEADER.size <= len(packet) <= _LONGEST_REQUEST:
        return None
    kind, length, cookie, transaction = _HEADER.unpack_from(packet)
    if kind != BINDING_REQUEST or cookie != _COOKIE or length != len(packet) - _HEADER.size or length % 4:
        return None
    attributes = _attributes(packet[_HEADER.size :])
    if attributes is None:
        return None
    known = {*_KNOWN, CHANGE_REQUEST} if two_ports and _asks_other_port(attributes) else _KNOWN
    unknown = sorted({kind for kind, _ in attributes if kind < _OPTIONAL_FROM} - known)
    if unknown:
        return _message(BINDING_ERROR, transaction, _error_420(unknown))
    return _message(BINDING_SUCCESS, transaction, _mapped_address(host, port, transaction))


@asynccontextmanager
async def stun_responders(host: str, port: int, second_port: int) -> AsyncIterator[tuple[int, int]]:
    """Answer on two UDP ports until the context ends; gives both. Raises SettingsError when one is taken."""
    async with (
        _responder(host, port, "--stun-port") as first,
        _responder(host, second_port, "--second-stun-port") as second,
    ):
        first.other, second.other = second, first
        yield first.port, second.port


@asynccontextmanager
async def _responder(host: str, port: int, option: str) -> AsyncIterator[_Responder]:
    try:
        transport, responder = await asyncio.get_running_loop().create_datagram_endpoint(
            _Responder, local_addr=(host or "0.0.0.0", port)
        )
    except OSError as error:
        raise SettingsError(
            f"cannot answer STUN on UDP {host}:{port}: {error.strerror or error};"
            f" is a relay running here already? Choose another --port or {option}"
        ) from None
    try:
        yield responder
    finally:
        transport.close()


class _Responder(asyncio.DatagramProtocol):
    """Answers each packet by itself; keeps nothing about anyone."""

    other: _Responder | None = None
    _transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        response = answer(data, addr[0], addr[1], two_ports=self.other is not None)
        if response is not None:
            speaker = self.other if self.other is not None and asks_other_port(data) else self
            speaker.tell(response, addr)

    def tell(self, response: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(response, addr)

    @property
    def port(self) -> int:
        port: int = self._transport.get_extra_info("sockname")[1]
        return port

    def error_received(self, exc: Exception) -> None:
        # An earlier answer met a closed port; the asker is gone.
        log.debug("stun: %s", exc)


def asks_other_port(request: bytes) -> bool:
    """Whether a request that was answered wants the answer from our other port."""
    return _asks_other_port(_attributes(request[_HEADER.size :]) or [])


def _asks_other_port(attributes: list[tuple[int, bytes]]) -> bool:
    return (CHANGE_REQUEST, _CHANGE_PORT) in attributes


def _attributes(body: bytes) -> list[tuple[int, bytes]] | None:
    """All attributes, or None when their lengths do not add up."""
    found: list[tuple[int, bytes]] = []
    offset = 0
    while offset < len(body):
        if offset + _ATTRIBUTE.size > len(body):
            return None
        kind, length = _ATTRIBUTE.unpack_from(body, offset)
        value = body[offset + _ATTRIBUTE.size :][:length]
        offset += _ATTRIBUTE.size + (length + 3) // 4 * 4
        found.append((kind, value))
    return found if offset == len(body) else None


def _mapped_address(host: str, port: int, transaction: bytes) -> bytes:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    # Xored, because some routers rewrite plain addresses that they find in packets.
    mask = struct.pack("!I", _COOKIE) + transaction
    raw = bytes(byte ^ key for byte, key in zip(address.packed, mask, strict=False))
    family = 1 if address.version == 4 else 2
    return _attribute(XOR_MAPPED_ADDRESS, struct.pack("!BBH", 0, family, port ^ (_COOKIE >> 16)) + raw)


def _error_420(unknown: list[int]) -> bytes:
    reason = _attribute(ERROR_CODE, struct.pack("!HBB", 0, 4, 20) + b"Unknown Attribute")
    return reason + _attribute(UNKNOWN_ATTRIBUTES, struct.pack(f"!{len(unknown)}H", *unknown))


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(kind, len(value)) + value + bytes(-len(value) % 4)


def _message(kind: int, transaction: bytes, attributes: bytes) -> bytes:
    return _HEADER.pack(kind, len(attributes), _COOKIE, transaction) + attributes
