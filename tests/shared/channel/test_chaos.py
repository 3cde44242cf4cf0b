"""Two relays, a data channel and a socket, cut again and again: streams both ways arrive whole."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack

import pytest

from relay.app import Relay
from relay.settings import RelaySettings
from shared.channel import Channel, Dialer, Listen, addresses, sockets, upgrade
from shared.identity import Identity
from shared.protocol import Close
from shared.relay_client import RelayClient
from tests.shared.channel.ends import (
    SESSION,
    End,
    body_of,
    cut_direct,
    cut_socket,
    numbered,
    swallow_direct,
    swallow_socket,
    until,
)

LASTS_S = 12.0
SIZES = (0, 400, 2_000, 40_000)
KINDS = {"relayed", "data channel", "socket"}


@pytest.mark.slow
@pytest.mark.usefixtures("each_transport")
@pytest.mark.parametrize("seed", range(2))
async def test_streams_arrive_whole_while_every_path_is_cut(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "RETRY_LOST_S", 0.3)
    monkeypatch.setattr(upgrade, "RETRY_S", 0.5)
    monkeypatch.setattr(upgrade, "PAUSE_S", 0.1)
    monkeypatch.setattr(sockets, "RETRY_LOST_S", 0.3)
    monkeypatch.setattr(sockets, "RETRY_S", 0.5)
    monkeypatch.setattr(sockets, "PAUSE_S", 0.1)
    monkeypatch.setattr(addresses, "LOOPBACK_TOO", True)
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(Relay(RelaySettings(port=0))) for _ in range(2)]
        made, clients = [], []
        for listen in (Listen("127.0.0.1"), None):
            identity = Identity.generate()
            own = [await stack.enter_async_context(RelayClient(relay.url, identity)) for relay in relays]
            end = End(identity, own[0])
            end.dialer = Dialer(identity, own, end._received, listen=listen, on_closed=end.closed.put_nowait)
            await stack.enter_async_context(end.dialer)
            made.append(end)
            clients += own
        ann, bob = made
        channel = await ann.dialer.channel(bob.id)
        await until(lambda: bob.dialer.channels)
        back = bob.channel_to(ann)
        stop = asyncio.Event()
        kinds: set[str] = set()

        async def stream(sender: Channel) -> int:
            number = 0
            while not stop.is_set():
                await sender.send(numbered(number), body_of(number, SIZES[number % 4]))
                number += 1
                await asyncio.sleep(chance.choice([0, 0, 0.002]))
            await sender.send(Close(SESSION))
            return number

        async def check(end: End) -> int:
            number = 0
            while not isinstance((got := await end.got()).message, Close):
                link = got.channel._path
                kinds.add("nothing" if link is None else link.kind)
                assert (got.number, got.body) == (number, body_of(number, SIZES[number % 4]))
                number += 1
            return number

        async def cut() -> None:
            """Never both relays at once without time to return: then a peer counts as gone, rightly.

            A busy machine may need longer than usual until each kind of path has carried something.
            """
            renewed = 0.0
            until_s = time.monotonic() + LASTS_S
            while time.monotonic() < until_s or not kinds >= KINDS:
                await asyncio.sleep(chance.random() * 0.6)
                victim = chance.choice([channel, back])
                harm = chance.choice(["cut", "swallow", "close", "relay", "doubt"])
                kind = chance.choice(["data channel", "socket"])
                there = victim.direct if kind == "data channel" else victim.socket
                calm = all(client.connected.is_set() for client in clients)
                if harm == "relay" and calm and time.monotonic() - renewed > 2:
                    renewed = time.monotonic()
                    link = chance.choice(clients)._link
                    assert link is not None
                    await link._socket.close()
                elif there is None:
                    continue
                elif harm == "close":
                    there.lost.set()
                elif harm == "doubt":
                    victim._distrust(there)
                elif kind == "socket":
                    (cut_socket if harm == "cut" else swallow_socket)(victim)
                else:
                    (cut_direct if harm == "cut" else swallow_direct)(victim)
            stop.set()

        with channel.watched(), back.watched():
            async with asyncio.TaskGroup() as tasks:
                sent = [tasks.create_task(stream(channel)), tasks.create_task(stream(back))]
                got = [tasks.create_task(check(bob)), tasks.create_task(check(ann))]
                tasks.create_task(cut())
        assert [task.result() for task in sent] == [task.result() for task in got]
        assert min(task.result() for task in got) > 500
        assert kinds >= KINDS
