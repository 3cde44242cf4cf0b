"""Two or more participants in one process, each with a dialer and an inbox, and ways to hurt their links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from relay.app import Relay
from relay.settings import RelaySettings
from shared.channel import Channel, Dialer, Listen
from shared.channel.link import LinkKind
from shared.channel.relayed import Relay as RelayConnection
from shared.identity import Identity, PeerId
from shared.protocol import Path, PeerMessage, Token
from shared.relay_client import RelayClient

SESSION = "5e" * 16
PATIENCE_S = 15.0


def numbered(number: int) -> Token:
    """A message that can be told from others."""
    return Token(session=SESSION, epoch=0, position=number, token=number)


class Got(NamedTuple):
    channel: Channel
    message: PeerMessage
    body: bytes
    path: Path

    @property
    def number(self) -> int:
        assert isinstance(self.message, Token)
        return self.message.position


class End:
    """A participant. What comes to it lies in `inbox` unless the test sets `handle`."""

    def __init__(
        self,
        identity: Identity,
        relay: RelayConnection,
        *,
        direct: bool = True,
        listen: Listen | None = None,
    ) -> None:
        self.identity = identity
        self.id: PeerId = identity.id
        self.relay = relay
        self.inbox: asyncio.Queue[Got] = asyncio.Queue()
        self.closed: asyncio.Queue[Channel] = asyncio.Queue()
        self.handle: Callable[[Got], object] | None = None
        self.dialer = Dialer(
            identity,
            relay,
            self._received,
            direct=direct,
            listen=listen,
            on_closed=self.closed.put_nowait,
        )

    async def _received(self, channel: Channel, message: PeerMessage, body: memoryview, path: Path) -> None:
        got = Got(channel, message, bytes(body), path)
        if self.handle is None:
            self.inbox.put_nowait(got)
        elif asyncio.iscoroutine(pending := self.handle(got)):
            await pending

    async def got(self) -> Got:
        async with asyncio.timeout(PATIENCE_S):
            return await self.inbox.get()

    def channel_to(self, other: End) -> Channel:
        return self.dialer.channels[other.id]


@asynccontextmanager
async def ends(
    count: int = 2,
    *,
    direct: bool = True,
    settings: RelaySettings | None = None,
    listen: Sequence[Listen | None] = (),
) -> AsyncIterator[list[End]]:
    """Participants at one real relay; each may listen on a port of its own."""
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(Relay(settings or RelaySettings(port=0)))
        made = []
        for number in range(count):
            identity = Identity.generate()
            client = await stack.enter_async_context(RelayClient(relay.url, identity))
            port = listen[number] if listen else None
            made.append(End(identity, client, direct=direct, listen=port))
        for end in made:
            await stack.enter_async_context(end.dialer)
        yield made


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - that is its purpose
            await asyncio.sleep(0.005)


async def both_direct(one: End, other: End) -> Channel:
    """A channel whose two ends have both moved to the direct link."""
    channel = await one.dialer.channel(other.id)
    await until(lambda: one.id in other.dialer.channels)
    back = other.channel_to(one)
    await until(lambda: channel.path == back.path == "direct")
    return channel


async def both_by(kind: LinkKind, one: End, other: End) -> Channel:
    """A channel whose two ends have both moved to a link of this kind."""
    channel = await one.dialer.channel(other.id)
    await until(lambda: one.id in other.dialer.channels)
    back = other.channel_to(one)
    await until(lambda: channel.report().kind == back.report().kind == kind)
    return channel


def mute(channel: Channel) -> None:
    """Nothing leaves this end any more, as when a machine hangs."""
    for link in channel._links():
        link.send = lambda frame: None  # type: ignore[method-assign]


def cut_direct(channel: Channel) -> None:
    """This end's sockets close without a word, as when its process is killed or its network is gone."""
    assert channel.direct is not None
    swallow_direct(channel)
    for protocol in channel.direct._gatherer._connection._protocols:
        protocol.transport.abort()


def swallow_direct(channel: Channel) -> None:
    """Packets of this end's direct link vanish, as when a router forgets it."""
    assert channel.direct is not None
    for protocol in channel.direct._gatherer._connection._protocols:
        protocol.transport.sendto = lambda *_: None  # type: ignore[method-assign]
    for guard in channel.direct._guards:
        guard.send = lambda *_: None  # type: ignore[attr-defined]


def cut_socket(channel: Channel) -> None:
    """This end's TCP connection is reset."""
    assert channel.socket is not None and channel.socket._transport is not None
    channel.socket._transport.abort()


def swallow_socket(channel: Channel) -> None:
    """What this end writes to its TCP connection vanishes, as when a firewall forgets it."""
    assert channel.socket is not None
    channel.socket.send = lambda frame: None  # type: ignore[method-assign]


async def send_numbers(channel: Channel, numbers: range, size: int = 2000, pause_s: float = 0.0) -> None:
    """A stream of decode messages whose bodies tell which they are."""
    for number in numbers:
        await channel.send(numbered(number), body_of(number, size))
        await asyncio.sleep(pause_s)


def body_of(number: int, size: int = 2000) -> bytes:
    return number.to_bytes(4, "little") * (size // 4)


async def expect_numbers(end: End, numbers: range, size: int = 2000) -> list[Path]:
    """All of them, once each, in order and unaltered. The paths they came by."""
    paths = []
    for number in numbers:
        got = await end.got()
        assert (got.number, got.body) == (number, body_of(number, size))
        paths.append(got.path)
    assert end.inbox.empty()
    return paths
