"""A small internet: two homes, each a machine behind a router, and a public side with a relay.

Three things keep it honest. A router drops unasked packets to itself, else its connection table remembers the
other home's early packet and gives our own answer another port. Packets to unknown addresses vanish, as out
there, instead of coming back as errors. And whoever takes part always reads its relay connection.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Literal, NamedTuple, Self, get_args

from tests.harness.commands import python, started
from tests.harness.namespaces import Namespace, namespaces
from tests.harness.wan import Cable, Line, cables

Kind = Literal["none", "firewall", "fullcone", "cone", "symmetric", "udpblocked"]
"""What a router does. "none" and "firewall" hide no addresses; the second lets only answers in. The cones
give a socket one public port, open to everyone or ("cone") only to those it wrote to. "symmetric" gives it
another port for each address that it writes to. "udpblocked" is a cone that lets no UDP through."""
KINDS: tuple[Kind, ...] = get_args(Kind)

RELAY_PORT = 8787


class Plan(NamedTuple):
    """The addresses of one home, in one family."""

    relay: str
    provider: str
    wan: str
    gateway: str
    machines: tuple[str, str]
    network: str
    everywhere: str


def plan(family: Literal[4, 6], home: int) -> Plan:
    if family == 6:
        return Plan(
            relay="fd42::1/128",
            provider=f"fd42:a{home}::1/64",
            wan=f"fd42:a{home}::2/64",
            gateway=f"fd42:{home}::1/64",
            machines=(f"fd42:{home}::10/64", f"fd42:{home}::11/64"),
            network=f"fd42:{home}::/64",
            everywhere="::/0",
        )
    return Plan(
        relay="198.51.100.1/32",
        provider=f"203.0.113.{4 * home + 1}/30",
        wan=f"203.0.113.{4 * home + 2}/30",
        gateway=f"10.0.{home}.1/24",
        machines=(f"10.0.{home}.10/24", f"10.0.{home}.11/24"),
        network=f"10.0.{home}.0/24",
        everywhere="0.0.0.0/0",
    )


class Router:
    """What stands between a home and the public side."""

    def __init__(self, namespace: Namespace, public: Namespace, addresses: Plan) -> None:
        self.namespace = namespace
        self._public = public
        self._addresses = addresses

    def become(self, kind: Kind) -> None:
        """Forget all rules and connections, and be a router of this kind.

        A connection that stayed known would keep its public port, and a new socket may get its old number.
        """
        self.namespace.nft(_rules(kind, plain(self._addresses.machines[0])))
        self.namespace.forget_connections()
        network, wan = self._addresses.network, plain(self._addresses.wan)
        # Only addresses that no router hides are known to the world.
        known = f"via {wan}" if kind in ("none", "firewall") else ""
        self._public.ip(f"route replace {'' if known else 'blackhole '}{network} {known}")

    def cut_udp(self) -> None:
        """From now on no UDP leaves the home, not even that of open connections."""
        self.namespace.nft("insert rule inet nat pass oifname wan meta l4proto udp drop\n")


class Home(NamedTuple):
    machine: Namespace
    router: Router


class Lab:
    """`with Lab() as lab: lab.left.router.become("cone")`. Both routers start as "none".

    `round_trip_ms` is that between the homes; a home and the relay are half as far apart. With `family` 6
    there is no IPv4 at all. With `one_lan` both machines are in the left home, with `twins` each home has the
    same addresses inside, as sold by one maker.
    """

    left: Home
    right: Home
    public: Namespace

    def __init__(
        self,
        *,
        round_trip_ms: float = 0,
        family: Literal[4, 6] = 4,
        one_lan: bool = False,
        twins: bool = False,
    ) -> None:
        self._round_trip_ms = round_trip_ms
        left, right = plan(family, 1), plan(family, 2)
        if twins:
            right = right._replace(gateway=left.gateway, machines=left.machines, network=left.network)
        self._plans = left, right
        self._one_lan = one_lan
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._build(stack)
            self._start_relay(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def relay_host(self) -> str:
        return plain(self._plans[0].relay)

    @property
    def relay_url(self) -> str:
        host = f"[{self.relay_host}]" if ":" in self.relay_host else self.relay_host
        return f"http://{host}:{RELAY_PORT}"

    # ------------------------------------------------------------ how it is built

    def _build(self, stack: ExitStack) -> None:
        roles = "public", "left-router", "right-router", "left", "right"
        self.public, *routers, left, right = stack.enter_context(namespaces(*roles))
        addresses = self._plans[0]
        self.public.ip(f"addr add {addresses.relay} dev lo", f"route add blackhole {addresses.everywhere}")
        self.public.forward()
        self._lay_lines(stack, routers)
        made = []
        for namespace, addresses in zip(routers, self._plans, strict=True):
            self._set_up(namespace, addresses)
            made.append(Router(namespace, self.public, addresses))
            made[-1].become("none")
        self.left = Home(left, made[0])
        self.right = Home(right, made[0] if self._one_lan else made[1])
        for place, home in enumerate((self.left, self.right)):
            self._move_in(home, self._plans[0 if self._one_lan else place], place)

    def _lay_lines(self, stack: ExitStack, routers: list[Namespace]) -> None:
        """From each router's "wan" to the public side, where the line's end has the router's side as name."""
        ends = tuple(zip(routers, ("left", "right"), strict=True))
        if self._round_trip_ms:
            line = Line(round_trip_ms=self._round_trip_ms / 2)
            lines = [Cable(router.name, "wan", self.public.name, side, line) for router, side in ends]
            stack.enter_context(cables(*lines))
            return
        for router, side in ends:
            router.ip(f"link add wan type veth peer name {side} netns {self.public.name}")

    def _set_up(self, router: Namespace, addresses: Plan) -> None:
        side = router.name.split("-")[-2]
        self.public.ip(f"link set {side} up", f"addr add {addresses.provider} dev {side} nodad")
        router.ip(
            "link add lan type bridge",
            "link set lan up",
            "link set wan up",
            f"addr add {addresses.wan} dev wan nodad",
            f"addr add {addresses.gateway} dev lan nodad",
            f"route add {addresses.everywhere} via {plain(addresses.provider)}",
        )
        router.forward()

    def _move_in(self, home: Home, addresses: Plan, place: int) -> None:
        """Plug a machine into its router."""
        socket = f"socket{place}"
        own = addresses.machines[place if self._one_lan else 0]
        home.router.namespace.ip(
            f"link add {socket} type veth peer name lan netns {home.machine.name}",
            f"link set {socket} master lan up",
        )
        home.machine.ip(
            "link set lan up",
            f"addr add {own} dev lan nodad",
            f"route add {addresses.everywhere} via {plain(addresses.gateway)}",
        )

    def _start_relay(self, stack: ExitStack) -> None:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        arguments = ["--host", self.relay_host, "--port", str(RELAY_PORT), "--log-level", "warning"]
        arguments += ["--database", str(directory / "relay.sqlite")]
        command = self.public.command(*python("relay", *arguments))
        stack.enter_context(started(command, says="Relay at"))


def plain(address: str) -> str:
    """Without the length of its network."""
    return address.partition("/")[0]


def _rules(kind: Kind, machine: str) -> str:
    """A router's rules as `nft` reads them, in place of those it has."""
    hides = kind not in ("none", "firewall")
    entry = f'iifname "wan" meta l4proto udp dnat ip to {machine}' if kind == "fullcone" else ""
    port = "random,fully-random" if kind == "symmetric" else ""
    return f"""
        flush ruleset
        table inet nat {{
            chain pass {{
                type filter hook forward priority filter; policy {"accept" if kind == "none" else "drop"};
                {'oifname "wan" meta l4proto udp drop' if kind == "udpblocked" else ""}
                ct state established,related accept
                ct status dnat accept
                iifname "lan" accept
            }}
            chain own {{
                type filter hook input priority filter; policy accept;
                iifname "wan" ct state new {"drop" if hides else "accept"}
            }}
            chain enter {{
                type nat hook prerouting priority dstnat; policy accept;
                {entry}
            }}
            chain leave {{
                type nat hook postrouting priority srcnat; policy accept;
                {f'oifname "wan" masquerade {port}' if hides else ""}
            }}
        }}
    """
