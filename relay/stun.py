"""Tell a participant its public UDP address: a STUN binding responder (RFC 8489, without authentication).

Beside the relay, so a self-hosted swarm needs no third party. Answers are 12 or 24 bytes longer than the
shortest request, so nobody gains from having us answer to a forged address.
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
ERROR_CODE = 0x0009
UNKNOWN_ATTRIBUTES = 0x000A

_COOKIE = 0x2112A442
_HEADER = struct.Struct("!HHI12s")
_ATTRIBUTE = struct.Struct("!HH")
# A binding request fits in one packet everywhere (RFC 8489 §6.1); longer ones are noise.
_LONGEST_REQUEST = 548
# Attributes below this number must be understood to answer (RFC 8489 §14).
_OPTIONAL_FROM = 0x8000
# USERNAME, MESSAGE-INTEGRITY, MESSAGE-INTEGRITY-SHA256: this responder checks no one, so they change nothing.
_KNOWN = frozenset((0x0006, 0x0008, 0x001C))


def answer(packet: bytes, host: str, port: int) -> bytes | None:
    """The response to a packet from host:port, or None when it is no binding request."""
    if not _HEADER.size <= len(packet) <= _LONGEST_REQUEST:
        return None
    kind, length, cookie, transaction = _HEADER.unpack_from(packet)
    if kind != BINDING_REQUEST or cookie != _COOKIE or length != len(packet) - _HEADER.size or length % 4:
        return None
    attributes = _attribute_types(packet[_HEADER.size :])
    if attributes is None:
        return None
    unknown = sorted({kind for kind in attributes if kind < _OPTIONAL_FROM} - _KNOWN)
    if unknown:
        return _message(BINDING_ERROR, transaction, _error_420(unknown))
    return _message(BINDING_SUCCESS, transaction, _mapped_address(host, port, transaction))


@asynccontextmanager
async def stun_responder(host: str, port: int) -> AsyncIterator[int]:
    """Answer on UDP until the context ends; gives the port. Raises SettingsError when it cannot be had."""
    try:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            _Responder, local_addr=(host or "0.0.0.0", port)
        )
    except OSError as error:
        raise SettingsError(
            f"cannot answer STUN on UDP {host}:{port}: {error.strerror or error};"
            " is a relay running here already? Choose another --port or --stun-port"
        ) from None
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        transport.close()


class _Responder(asyncio.DatagramProtocol):
    """Answers each packet by itself; keeps nothing about anyone."""

    _transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        response = answer(data, addr[0], addr[1])
        if response is not None:
            self._transport.sendto(response, addr)

    def error_received(self, exc: Exception) -> None:
        # An earlier answer met a closed port; the asker is gone.
        log.debug("stun: %s", exc)


def _attribute_types(body: bytes) -> list[int] | None:
    """The types of all attributes, or None when their lengths do not add up."""
    kinds: list[int] = []
    offset = 0
    while offset < len(body):
        if offset + _ATTRIBUTE.size > len(body):
            return None
        kind, length = _ATTRIBUTE.unpack_from(body, offset)
        offset += _ATTRIBUTE.size + (length + 3) // 4 * 4
        kinds.append(kind)
    return kinds if offset == len(body) else None


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
