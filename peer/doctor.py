"""`python -m peer doctor`: what stands between this machine and a swarm, one line for each thing looked at.

It tells no addresses unless asked to, so that what it prints can be shown to others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Annotated, Literal

import aioice.stun
import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from peer.devices import choose_devices, compute_dtype, free_bytes, in_words
from peer.settings import PeerSettings, free_memory
from shared import event_loop
from shared.announcement import read_announcement
from shared.channel import Channel, Dialer, Listen
from shared.channel.addresses import local_interfaces, parse_listen
from shared.channel.listening import ListeningPort
from shared.channel.nat import look
from shared.errors import ConnectionLost, CorollaError, ProtocolError, SettingsError
from shared.identity import Identity, PeerId
from shared.logs import configure_logs
from shared.protocol import Announcement, NatKind, Path, PeerMessage
from shared.relay_client import RelayClient
from shared.settings import (
    AdvertiseOption,
    ListenOption,
    LogLevelOption,
    RelayOption,
    relay_url,
    relay_urls,
)

STUN_TIMEOUT_S = 1.0
STUN_TRIES = 3
# Direct paths come within a second, or their attempts end within seven.
PATHS_S = 9.0
MAX_PEERS = 8

State = Literal["well", "mind", "broken"]
NO_RELAY = "without a relay nobody finds this machine"
BY_TCP = "forward a TCP port to this machine: see --listen, --advertise"
_ROUTERS: dict[NatKind, tuple[State, str]] = {
    "open": ("well", "none translates this machine's addresses, so direct paths open with everyone"),
    "cone": ("well", "it keeps one public port for all, so direct paths open with everyone"),
    "restricted": ("well", "it lets in only what answers, so direct paths open with all but symmetric ones"),
    "symmetric": ("mind", "it is symmetric, so many direct paths stay closed"),
    "blocked": ("mind", "it stops UDP, so there are direct paths by TCP only"),
    "unknown": ("well", "the relay cannot tell what it does"),
}
_MARKS = {"well": "[green]✓[/]", "mind": "[yellow]![/]", "broken": "[red]✗[/]"}
_ADDRESS = re.compile(
    r"(?:https?|wss?)://[^\s,;)]*[^\s,;):]"
    r"|\[?\b[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7}\b\]?(?::\d+)?"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d+)?"
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, how it is, and what to do about it."""

    what: str
    state: State
    says: str
    todo: str = ""

    def redacted(self, hosts: Collection[str]) -> Finding:
        says, todo = (redact(text, hosts) for text in (self.says, self.todo))
        return msgspec.structs.replace(self, says=says, todo=todo)


def redact(text: str, hosts: Collection[str] = ()) -> str:
    """The text without addresses, and without these names of machines."""
    text = _ADDRESS.sub("(address)", text)
    for host in hosts:
        text = text.replace(host, "(address)")
    return text


def doctor(
    relay: RelayOption = None,
    listen: ListenOption = "0",
    advertise: AdvertiseOption = None,
    device: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_DEVICE", help="auto, cpu, mps, cuda (all GPUs), or GPUs: cuda:1 or cuda:0,cuda:2."
        ),
    ] = "auto",
    show_addresses: Annotated[
        bool, typer.Option("--show-addresses", help="Tell addresses too; they say where you are.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    log_level: LogLevelOption = "warning",
) -> None:
    """Look at what this machine needs to take part: relay, UDP, port, paths to the live peers, device."""
    configure_logs(log_level)
    settings = PeerSettings(
        relays=relay_urls(relay), device=device, listen=parse_listen(listen, advertise or ())
    )
    broken = event_loop.run(_tell(settings, show_addresses=show_addresses, as_json=as_json))
    raise typer.Exit(1 if broken else 0)


async def _tell(settings: PeerSettings, *, show_addresses: bool, as_json: bool) -> bool:
    console = Console(soft_wrap=True)
    hosts = {host for host, _ in _advertised(settings)}
    hosts |= {host for url in settings.relays if (host := relay_url(url).host)}
    found: list[Finding] = []
    async for finding in examine(settings):
        shown = finding if show_addresses else finding.redacted(hosts)
        found.append(shown)
        if not as_json:
            advice = f" [bold]→ {escape(shown.todo)}[/]" if shown.todo else ""
            console.print(f"{_MARKS[shown.state]} [bold]{shown.what}[/]  {escape(shown.says)}{advice}")
    if as_json:
        typer.echo(json.dumps([msgspec.to_builtins(finding) for finding in found], ensure_ascii=False))
    return any(finding.state == "broken" for finding in found)


def _advertised(settings: PeerSettings) -> tuple[tuple[str, int], ...]:
    return settings.listen.advertise if settings.listen is not None else ()


# ---------------------------------------------------------------- looking


async def examine(settings: PeerSettings) -> AsyncIterator[Finding]:
    """Everything there is to look at, in an order in which one thing rests on those before it."""
    yield _device(settings)
    yield _memory(settings)
    yield await _port(settings.listen)
    identity = Identity.generate()
    async with AsyncExitStack() as stack:
        relays: list[RelayClient] = []
        for url in settings.relays:
            relay = RelayClient(url, identity)
            started = time.perf_counter()
            try:
                await stack.enter_async_context(relay)
            except CorollaError as error:
                yield Finding(what="relay", state="broken", says=str(error), todo=NO_RELAY)
                continue
            login_ms = (time.perf_counter() - started) * 1000
            yield Finding(what="relay", state="well", says=f"{url} let us in after {login_ms:.0f} ms")
            relays.append(relay)
        if relays:
            for finding in await _udp(relays[0]):
                yield finding
            async for finding in _paths(settings, identity, relays):
                yield finding


def _device(settings: PeerSettings) -> Finding:
    try:
        devices = choose_devices(settings.device)
    except SettingsError as error:
        return Finding(what="device", state="broken", says=str(error))
    numbers = str(compute_dtype(settings, devices[0])).removeprefix("torch.")
    return Finding(what="device", state="well", says=f"{in_words(devices)}, computes in {numbers}")


def _memory(settings: PeerSettings) -> Finding:
    try:
        free = sum(map(free_bytes, choose_devices(settings.device)))
    except SettingsError:
        free = free_memory()
    says = f"{free / 1e9:.1f} GB are free for layers and for the caches of chats"
    if free < 2 * 10**9:
        return Finding(
            what="memory",
            state="mind",
            says=says,
            todo="serve few layers: --layers and --kv-memory say how many",
        )
    return Finding(what="memory", state="well", says=says)


async def _port(listen: Listen | None) -> Finding:
    if listen is None:
        return Finding(what="port", state="mind", says="none: others reach this machine by UDP or the relay")
    try:
        async with ListeningPort(listen) as port:
            told = await port.addresses(local_interfaces())
    except SettingsError as error:
        return Finding(
            what="port", state="mind", says=str(error), todo="if a peer runs here already, it has that port"
        )
    if not told:
        return Finding(
            what="port", state="mind", says="this machine has no address that another one could reach"
        )
    outside = listen.advertise or any(ipaddress.ip_address(address.ip).is_global for address in told)
    return Finding(
        what="port",
        state="well",
        says=f"direct connections may come in at {', '.join(map(str, told))}",
        todo=""
        if outside
        else "from outside your home only with a forwarded port: see --listen, --advertise",
    )


# ---------------------------------------------------------------- UDP


async def _udp(relay: RelayClient) -> list[Finding]:
    if relay.stun is None:
        return [
            Finding(
                what="UDP",
                state="mind",
                says="the relay answers no STUN, so direct paths work in the same network only",
                todo="whoever runs the relay can open its UDP port",
            )
        ]
    started = time.perf_counter()
    try:
        public = await ask_stun(*relay.stun)
    except OSError:
        return [
            Finding(
                what="UDP",
                state="mind",
                says="no answer from the relay's STUN responder: UDP is blocked here or there",
                todo=f"let UDP out of this network, or {BY_TCP}",
            )
        ]
    took_ms = (time.perf_counter() - started) * 1000
    answer = Finding(
        what="UDP",
        state="well",
        says=f"STUN answers after {took_ms:.0f} ms and sees this machine at {public[0]}:{public[1]}",
    )
    kind = await look(*relay.stun, relay.second_stun_port) if relay.second_stun_port else "unknown"
    state, words = _ROUTERS[kind]
    todo = BY_TCP if state == "mind" else ""
    return [answer, Finding(what="router", state=state, says=words, todo=todo)]


async def ask_stun(host: str, port: int) -> tuple[str, int]:
    """The address and port of ours that a STUN responder sees. Raises OSError when it does not answer."""
    loop = asyncio.get_running_loop()
    family, _, _, _, there = (await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM))[0]
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.setblocking(False)
        asking.connect(there)
        request = aioice.stun.Message(aioice.stun.Method.BINDING, aioice.stun.Class.REQUEST)
        for _ in range(STUN_TRIES):
            await loop.sock_sendall(asking, bytes(request))
            with suppress(TimeoutError, ValueError):
                async with asyncio.timeout(STUN_TIMEOUT_S):
                    answer = aioice.stun.parse_message(await loop.sock_recv(asking, 2048))
                if answer.transaction_id == request.transaction_id:
                    seen: tuple[str, int] = answer.attributes["XOR-MAPPED-ADDRESS"]
                    return seen
    raise OSError("no answer")


# ---------------------------------------------------------------- paths


async def _paths(
    settings: PeerSettings, identity: Identity, relays: Sequence[RelayClient]
) -> AsyncIterator[Finding]:
    """To each live peer: which path this machine gets, and why not a better one."""
    known: dict[str, Announcement] = {}
    for relay in relays:
        for record in await relay.lookup():
            with suppress(ProtocolError):
                announcement = read_announcement(record, time.time())
                if announcement.state == "serving":
                    known[announcement.peer] = announcement
    peers = list(known.values())
    if not peers:
        yield Finding(what="peers", state="mind", says="no relay knows a peer that serves now")
        return
    listen = Listen() if settings.listen is not None else None
    async with Dialer(identity, relays, _ignore, listen=listen) as dialer:
        looks = [asyncio.create_task(_path_to(dialer, peer)) for peer in peers[:MAX_PEERS]]
        try:
            for look in looks:
                yield await look
        finally:
            for look in looks:
                look.cancel()
    if len(peers) > MAX_PEERS:
        yield Finding(what="peers", state="well", says=f"and {len(peers) - MAX_PEERS} more")


async def _path_to(dialer: Dialer, peer: Announcement) -> Finding:
    what = f"path to {peer.name or peer.peer[:8]}"
    try:
        channel = await dialer.channel(PeerId(peer.peer))
    except ConnectionLost as error:
        return Finding(what=what, state="mind", says=str(error))
    with suppress(TimeoutError):
        async with asyncio.timeout(PATHS_S):
            while channel.seeking:  # noqa: ASYNC110 - what a person waits for needs no event of its own
                await asyncio.sleep(0.05)
    report = channel.report()
    return Finding(what=what, state="mind" if report.kind == "relayed" else "well", says=report.words())


def _ignore(channel: Channel, message: PeerMessage, body: memoryview, path: Path) -> None:
    """A doctor serves nobody."""
