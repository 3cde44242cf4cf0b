"""The port where the other ends of our channels may call, and nobody else.

Whoever connects has `HELLO_S` to send one hello of a channel that waits for it, of exactly `HELLO_BYTES`.
Anything else ends the connection without a word. Few may be that far at once, and fewer from one address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

from shared.channel.addresses import (
    MAX_ADDRESSES,
    Address,
    Interface,
    Listen,
    aimless,
    own_addresses,
    resolved,
)
from shared.channel.tcp import HELLO_BYTES, LENGTH, NONCE_BYTES, TAG_AT
from shared.errors import SettingsError

log = logging.getLogger(__name__)

HELLO_S = 3.0
MAX_HALF_OPEN = 64
MAX_HALF_OPEN_PER_NETWORK = 4

Welcome = Callable[[bytes, bytes, asyncio.Transport], bool]
"""Takes nonce, sealed hello and connection; False when the hello is not a good one."""


class ListeningPort:
    """`async with ListeningPort(Listen()) as port:` then `expect` callers by the tag of their hello."""

    def __init__(self, listen: Listen) -> None:
        self.port = 0
        """Where it listens, once entered."""
        self.turned_away = 0
        """Connections that were no hello of a channel, or one too many."""
        self.half_open: Counter[str] = Counter()
        """Connections without a hello yet, by network."""
        self.callers: set[_Caller] = set()
        """The same, one by one."""
        self._listen = listen
        self._expected: dict[bytes, Welcome] = {}
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        host, port, _ = self._listen
        try:
            bound = _bound(host, port)
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {host or '*'}:{port}: {error.strerror or error};"
                " choose another --listen, or --listen off"
            ) from None
        self.port = bound.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(lambda: _Caller(self), sock=bound)
        log.info("direct paths may come in on TCP port %d", self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for caller in tuple(self.callers):
            caller.turn_away()
        await self._server.wait_closed()

    async def addresses(self, interfaces: frozenset[Interface]) -> list[Address]:
        """Under which addresses others may reach it, forwarded ones first."""
        host = ipaddress.ip_address(self._listen.host or "::")
        if host.is_unspecified:
            own = own_addresses(interfaces, self.port)
        else:
            own = [] if aimless(host) else [Address(str(host), self.port)]
        return [*await resolved(self._listen.advertise), *own][:MAX_ADDRESSES]

    def expect(self, tag: bytes, welcome: Welcome) -> None:
        """From now on a hello with this tag is for `welcome`."""
        self._expected[tag] = welcome

    def forget(self, tag: bytes) -> None:
        self._expected.pop(tag, None)

    def admits(self, network: str) -> bool:
        """Whether one more of this network may try."""
        return self.half_open.total() < MAX_HALF_OPEN and self.half_open[network] < MAX_HALF_OPEN_PER_NETWORK

    def passes(self, hello: bytes, transport: asyncio.Transport) -> bool:
        """Hand a connection to the channel that its hello is for."""
        welcome = self._expected.get(hello[TAG_AT : TAG_AT + 8])
        return welcome is not None and welcome(hello[:NONCE_BYTES], hello[TAG_AT:], transport)


class _Caller(asyncio.Protocol):
    """One connection until its hello is here."""

    def __init__(self, port: ListeningPort) -> None:
        self._port = port
        self._came = bytearray()
        self._network = ""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        network = network_of(transport.get_extra_info("peername"))
        if not self._port.admits(network):
            self.turn_away()
            return
        self._network = network
        self._port.half_open[network] += 1
        self._port.callers.add(self)
        self._timer = asyncio.get_running_loop().call_later(HELLO_S, self.turn_away)

    def data_received(self, data: bytes) -> None:
        self._came += data[: HELLO_BYTES + 1]
        length = self._came[NONCE_BYTES:TAG_AT]
        # The dialling side says nothing more before it is answered.
        if len(self._came) > HELLO_BYTES or length != _LENGTH[: len(length)]:
            self.turn_away()
        elif len(self._came) == HELLO_BYTES:
            if self._port.passes(bytes(self._came), self._transport):
                self._done()
            else:
                self.turn_away()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()

    def turn_away(self) -> None:
        """End it without a word."""
        self._port.turned_away += 1
        self._done()
        self._transport.abort()

    def _done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._port.callers.discard(self)
        if self._network:
            self._port.half_open[self._network] -= 1
            if not self._port.half_open[self._network]:
                del self._port.half_open[self._network]
            self._network = ""


_LENGTH = LENGTH.pack(HELLO_BYTES - TAG_AT)


def network_of(peername: tuple[str, int] | None) -> str:
    """Whom a connection counts for: an IPv4 address, or an IPv6 /64, since a home has a whole one."""
    if peername is None:
        return "?"
    ip = ipaddress.ip_address(peername[0].partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return str(ipaddress.ip_network((ip, 64), strict=False))
        ip = ip.ipv4_mapped
    return str(ip)


def _bound(host: str, port: int) -> socket.socket:
    """A socket for one address, or for all of this machine's by both versions of IP."""
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MAX_HALF_OPEN)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=MAX_HALF_OPEN
        )
    return socket.create_server(("", port), backlog=MAX_HALF_OPEN)
