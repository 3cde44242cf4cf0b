"""Which addresses we tell the other end of a channel, and which of those it tells we try.

Addresses of a home lead nowhere from outside and say something of it, so only neighbours hear them. What a
stranger tells must not make us knock at doors of its choice. So we try few addresses, never our own
loopback, and a private one only when it lies in a network that we are in ourselves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import NamedTuple

import ifaddr

from shared.errors import SettingsError

IPAddress = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface

MAX_ADDRESSES = 8
# What listens below is the machine's own business, and often trusts whoever comes from the same network.
FIRST_PORT = 1024
# For tests: both ends on this machine and nothing leaves it.
LOOPBACK_TOO = False

# Addresses that every home has for itself (RFC 1918, RFC 4193).
_HOME = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")]
_HIDDEN = ["0.0.0.0", "9"]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Networks inside this machine, of containers and virtual machines: nobody else is there.
_INTERNAL = ("docker", "br-", "veth", "virbr", "vmnet", "vboxnet", "podman", "cni")


class Address(NamedTuple):
    """Where a socket listens."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class Listen(NamedTuple):
    """Where to wait for the other ends of channels."""

    host: str = ""
    """The address to listen on; all of this machine's when empty."""
    port: int = 0
    """0 takes a free one."""
    advertise: tuple[tuple[str, int], ...] = ()
    """Hosts and ports under which a router passes callers on to us."""


def parse_listen(text: str, advertise: Sequence[str] = ()) -> Listen | None:
    """Read `--listen`: `off`, a port, or `HOST:PORT`. Raises SettingsError for anything else."""
    known = tuple(_host_port(each, "--advertise", "203.0.113.7:4001") for each in advertise)
    for host, port in known:
        if port < FIRST_PORT:
            raise SettingsError(
                f"--advertise {host}:{port} is tried by nobody: forward a port from {FIRST_PORT} up"
            )
    if text == "off":
        if known:
            raise SettingsError("--advertise is of no use with --listen off")
        return None
    if text.isascii() and text.isdigit():
        text = f":{text}"
    host, port = _host_port(text, "--listen", "4001 or 192.168.1.5:4001", empty_host=True)
    if host:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise SettingsError(f"--listen {text}: write an address of this machine, not a name") from None
    return Listen(host, port, known)


def _host_port(text: str, flag: str, example: str, *, empty_host: bool = False) -> tuple[str, int]:
    host, colon, port = text.strip().rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if ":" in bare and bare == host:
        colon = ""  # an IPv6 address without brackets: nobody can tell where its port begins
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    if not colon or not (bare or empty_host) or not 0 <= number <= 65535 or (number == 0 and not empty_host):
        raise SettingsError(f"{flag} {text!r} is no host and port: write it like {example}")
    return bare, number


# ---------------------------------------------------------------- ours


def local_interfaces() -> frozenset[Interface]:
    """The addresses of this machine that others may reach, with their networks. Takes half a millisecond."""
    found: set[Interface] = set()
    for adapter in ifaddr.get_adapters():
        if adapter.nice_name.startswith(_INTERNAL):
            continue
        for each in adapter.ips:
            ip = each.ip[0] if isinstance(each.ip, tuple) else each.ip
            interface = ipaddress.ip_interface(f"{ip}/{each.network_prefix}")
            if not aimless(interface.ip):
                found.add(interface)
    return frozenset(found)


def own_addresses(interfaces: Iterable[Interface], port: int) -> list[Address]:
    """Under which addresses others may try the port, the likeliest first."""
    ips = sorted((interface.ip for interface in interfaces), key=lambda ip: (not ip.is_private, str(ip)))
    return [Address(str(ip), port) for ip in ips]


def neighbours(own_seen: str, their_seen: str) -> bool:
    """Whether two may be in one network, by where a relay sees each of them.

    A relay that sees us by an address of a home is in our network, and so are those who meet us there.
    """
    own, theirs = _ip(own_seen), _ip(their_seen)
    if own is None or own.is_loopback or _of_a_home(own):
        return True
    if isinstance(own, IPv6Address) and isinstance(theirs, IPv6Address):
        return theirs in ipaddress.ip_network((own, 64), strict=False)
    return own == theirs


def public_interfaces(interfaces: Iterable[Interface]) -> frozenset[Interface]:
    """Those that say nothing of a home."""
    return frozenset(interface for interface in interfaces if not _of_a_home(interface.ip))


def public_candidates(candidates: Iterable[str]) -> list[str]:
    """ICE candidates (RFC 8839) with 0.0.0.0 for the addresses of a home, which nobody tries.

    None is left out: a description without any says that its sender wants no direct link.
    """
    told = []
    for candidate in candidates:
        words = candidate.split()
        ip = _ip(words[4])
        if ip is None or _of_a_home(ip):
            words[4:6] = _HIDDEN
        if "raddr" in words:
            at = words.index("raddr")
            words[at + 1 : at + 4 : 2] = _HIDDEN
        told.append(" ".join(words))
    return told


def _of_a_home(ip: IPAddress) -> bool:
    return any(ip in network for network in _HOME)


def _ip(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


async def resolved(advertised: Iterable[tuple[str, int]]) -> list[Address]:
    """Forwarded ports as numbers. We ask for our own names, so that nobody asks for a stranger's."""
    loop = asyncio.get_running_loop()
    found: list[Address] = []
    for host, port in advertised:
        try:
            answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            continue  # A name that is not known today; the other addresses may do.
        found += [Address(str(where[0]), port) for *_, where in answers]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- theirs


def worth_trying(told: Sequence[str], ours: Iterable[Interface]) -> list[Address]:
    """The addresses that we try of those we were told, in that order: those of our own networks first."""
    networks = [interface.network for interface in ours]
    near: list[Address] = []
    far: list[Address] = []
    for text in told[:MAX_ADDRESSES]:
        address = _parsed(text)
        if address is None or address.port < FIRST_PORT:
            continue
        ip = ipaddress.ip_address(address.ip)
        if aimless(ip):
            continue
        if any(ip in network for network in networks):
            near.append(address)
        elif ip.is_global:
            far.append(address)
    return list(dict.fromkeys(near + far))


def aimless(ip: IPAddress) -> bool:
    """True for what leads to nobody in particular, or back to ourselves."""
    if ip.is_loopback:
        return not LOOPBACK_TOO
    return ip.is_multicast or ip.is_unspecified or ip.is_link_local or str(ip) == "255.255.255.255"


def _parsed(text: str) -> Address | None:
    host, _, port = text.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        return None
    if isinstance(ip, IPv6Address):
        if ip.scope_id is not None:
            return None
        # These carry an IPv4 address that our checks would not see.
        if ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in _NAT64:
            return None
    return Address(str(ip), int(port))
