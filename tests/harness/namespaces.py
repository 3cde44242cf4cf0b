"""Network namespaces of this process's own: each a machine with addresses, routes and a firewall. Needs root.

Their names carry the process id, so test runs side by side do not meet. Links run from one to the other and
never touch the namespace that the tests run in.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_numbers = itertools.count()

_FORGET = """
import socket, struct
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netfilter:  # NETLINK_NETFILTER
    # CTNETLINK's IPCTNL_MSG_CT_DELETE that names no connection, to be acknowledged.
    netfilter.send(struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 1 | 4, 0, 0, 0, 0, 0))
    *_, error = struct.unpack_from("=IHHIIi", netfilter.recv(4096))
    raise SystemExit(error and f"the connections stay known: error {error}")
"""


class Namespace:
    """A machine of its own, as far as the network goes. `removed` when the `with` of its maker ends."""

    def __init__(self, name: str) -> None:
        self.name = name

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs another one in here; it becomes that process, with its id."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def ip(self, *commands: str) -> None:
        """Run lines of `ip`, such as "addr add 192.0.2.1/24 dev lan"."""
        _run(["ip", "-n", self.name, "-batch", "-"], "\n".join(commands))

    def nft(self, rules: str) -> None:
        """Run lines of `nft`."""
        _run(self.command("nft", "-f", "-"), rules)

    def forget_connections(self) -> None:
        """Empty the table of connections, with the public ports that it gave them."""
        _run(self.command(sys.executable, "-S", "-c", _FORGET))

    def forward(self) -> None:
        """Pass on packets for others, as a router does."""
        on = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"
        _run(self.command("sh", "-c", on))


@contextmanager
def namespaces(*roles: str) -> Iterator[list[Namespace]]:
    """One namespace for each role, all removed in the end, with every link and rule in them."""
    number = next(_numbers)
    made: list[Namespace] = []
    try:
        for role in roles:
            namespace = Namespace(f"corolla-{os.getpid()}-{number}-{role}")
            _run(["ip", "netns", "add", namespace.name])
            made.append(namespace)
            namespace.ip("link set lo up")
        yield made
    finally:
        for namespace in made:
            with suppress(OSError):
                _run(["ip", "netns", "delete", namespace.name])


@functools.cache
def why_unavailable() -> str:
    """Why this process can make no namespaces with routers in them; empty when it can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed: run `make network`"
    try:
        with namespaces("probe") as (probe,):
            probe.nft(
                "add table ip probe\n"
                "add chain ip probe out { type nat hook postrouting priority 100; }\n"
                "add rule ip probe out masquerade random,fully-random\n"
            )
            probe.ip("link add one type veth peer name two", "tuntap add dev three mode tun")
    except OSError as error:
        return f"this system lets us build no routers: {error}"
    return ""


def _run(command: list[str], given: str = "") -> None:
    """Raises OSError with what the command complained about."""
    done = subprocess.run(command, input=given, text=True, capture_output=True, check=False, timeout=30)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` failed: {done.stderr.strip()} {given}")
