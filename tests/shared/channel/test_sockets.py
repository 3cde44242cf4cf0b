"""Sockets between the two ends of a channel, where one can reach the other's port."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import socket

import pytest

from shared import event_loop
from shared.channel import Channel, Listen, addresses, dialer, sockets
from shared.channel import channel as channel_file
from shared.errors import SettingsError
from shared.framing import LONG_CHUNK_BYTES
from shared.protocol import Listening, Path
from tests.shared.channel.ends import (
    End,
    both_by,
    cut_socket,
    ends,
    expect_numbers,
    numbered,
    send_numbers,
    swallow_socket,
    until,
)

HERE = Listen("127.0.0.1")


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends reach each other by the loopback address, which is refused elsewhere."""
    monkeypatch.setattr(addresses, "LOOPBACK_TOO", True)


@pytest.mark.parametrize("listen", [(HERE, HERE), (HERE, None), (None, HERE)])
async def test_one_listening_side_is_enough_for_a_socket(listen: tuple[Listen | None, Listen | None]) -> None:
    async with ends(listen=listen) as (ann, bob):
        channel = await both_by("socket", ann, bob)
        await channel.send(numbered(1), b"by the socket")
        got = await bob.got()
        await got.channel.send(numbered(2), b"and back")

        assert (got.body, got.path) == (b"by the socket", "direct")
        assert (await ann.got()).body == b"and back"
        report = channel.report()
        assert (report.kind, report.why) == ("socket", "")
        assert report.rtt_ms is not None
        assert len(channel._sockets.links) == 1


async def test_two_who_both_listen_end_with_one_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ends(listen=(HERE, HERE)) as (ann, bob):
        channel = await both_by("socket", ann, bob)
        await asyncio.sleep(sockets.SECOND_S + 0.2)

        assert len(channel._sockets.links) == len(bob.channel_to(ann)._sockets.links) == 1


async def test_messages_of_any_size_go_both_ways_on_a_socket() -> None:
    def body(number: int) -> bytes:
        return random.Random(number).randbytes([0, 1, 16_384, 300_000][number % 4])

    async def stream(channel: Channel) -> None:
        for number in range(80):
            await channel.send(numbered(number), body(number))

    async def check(end: End) -> set[Path]:
        paths = set()
        for number in range(80):
            got = await end.got()
            assert (got.number, got.body) == (number, body(number))
            paths.add(got.path)
        return paths

    async with ends(listen=(HERE, None)) as (ann, bob):
        channel = await both_by("socket", ann, bob)
        await asyncio.gather(stream(channel), stream(bob.channel_to(ann)))

        assert await check(bob) == await check(ann) == {"direct"}
        assert channel.socket is not None
        # A quarter of the messages are cut; each of the others is one frame.
        assert channel.socket.carried >= 20 * -(-300_000 // LONG_CHUNK_BYTES) + 60


@pytest.mark.parametrize("harm", [cut_socket, swallow_socket])
async def test_a_stream_goes_on_when_the_socket_dies(harm: object) -> None:
    async with ends(listen=(HERE, None)) as (ann, bob):
        channel = await both_by("socket", ann, bob)
        with channel.watched():
            sending = asyncio.create_task(send_numbers(channel, range(400), pause_s=0.002))
            await until(lambda: bob.inbox.qsize() > 50)
            (cut_socket if harm is cut_socket else swallow_socket)(channel)
            await expect_numbers(bob, range(400))
            await sending

        assert channel.report().kind != "socket"
        assert not channel.closed.is_set()


async def test_a_lost_socket_is_sought_again_while_messages_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "RETRY_LOST_S", 0.05)
    monkeypatch.setattr(sockets, "PAUSE_S", 0.05)
    async with ends(listen=(HERE, None)) as (ann, bob):
        channel = await both_by("socket", ann, bob)
        first = channel.socket
        cut_socket(channel)
        await until(lambda: channel.socket is None)

        async def chat() -> None:
            for number in range(10_000):
                await channel.send(numbered(number))
                await asyncio.sleep(0.01)

        chatting = asyncio.create_task(chat())
        await both_by("socket", ann, bob)
        chatting.cancel()
        assert channel.socket is not first


async def test_direct_links_of_a_quiet_channel_close_and_come_back_with_the_next_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_file, "IDLE", channel_file.IDLE._replace(tick_s=0.02))
    monkeypatch.setattr(channel_file, "QUIET_S", 1.0)
    monkeypatch.setattr(sockets, "PAUSE_S", 0.05)
    async with ends(listen=(HERE, None)) as (ann, bob):
        channel = await both_by("socket", ann, bob)
        await until(lambda: not channel.directs and not bob.channel_to(ann).directs)
        assert channel.path == "relayed"
        await until(lambda: "nothing was said for a while" in channel.report().why)
        assert channel.report().resting

        await channel.send(numbered(1))
        assert (await bob.got()).path == "relayed"
        await both_by("socket", ann, bob)
        assert not channel.report().resting


async def test_a_changed_network_is_tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ann's port was out of Bob's reach until her machine got an address in his network."""
    monkeypatch.setattr(sockets, "PAUSE_S", 0.05)
    async with ends(listen=(HERE, None)) as (ann, bob):
        told: list[Listening] = []
        port = ann.dialer.port
        assert port is not None
        channel = await ann.dialer.channel(bob.id)
        await until(lambda: channel.socket is not None)
        back = bob.channel_to(ann)
        heard = back._sockets.told

        def listen(message: Listening) -> None:
            told.append(message)
            heard(message)

        monkeypatch.setattr(back._sockets, "told", listen)
        cut_socket(channel)
        await until(lambda: channel.socket is None)

        channel.look_again()

        await until(lambda: channel.socket is not None)
        assert told[-1].addresses == [f"127.0.0.1:{port.port}"]


async def test_a_machine_that_moves_tells_its_new_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialer, "LOOK_AT_ADDRESSES_S", 0.02)
    here = frozenset([ipaddress.ip_interface("127.0.0.1/8")])
    there = frozenset([*here, ipaddress.ip_interface("127.0.0.2/8")])
    found = [here]
    monkeypatch.setattr(dialer, "local_interfaces", lambda: found[-1])
    async with ends(listen=(Listen(), None)) as (ann, bob):
        await ann.dialer.channel(bob.id)
        await until(lambda: bob.dialer.channels)
        sockets_of_bob = bob.channel_to(ann)._sockets

        def told() -> list[str]:
            return [] if sockets_of_bob._theirs is None else sockets_of_bob._theirs.addresses

        assert ann.dialer.port is not None
        await until(lambda: len(told()) == 1)
        found.append(there)
        await until(lambda: len(told()) == 2)
        assert told()[1] == f"127.0.0.2:{ann.dialer.port.port}"


def allows_cubic() -> bool:
    with socket.socket() as trial, contextlib.suppress(OSError, AttributeError):
        trial.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        return True
    return False


async def test_small_frames_leave_at_once_and_nothing_paces_them() -> None:
    async with ends(listen=(HERE, None)) as (ann, bob):
        channel = await both_by("socket", ann, bob)
        for end in (channel.socket, bob.channel_to(ann).socket):
            assert end is not None and end._transport is not None
            handle = end._transport.get_extra_info("socket")
            with socket.fromfd(handle.fileno(), handle.family, handle.type) as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                if allows_cubic():
                    used = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                    assert not used.startswith(b"bbr")


def test_sockets_open_carry_and_break_on_the_loop_that_programs_use() -> None:
    """A connection changes hands after its hello, which each kind of event loop does in its own way."""

    async def life() -> None:
        async with ends(listen=(HERE, None)) as (ann, bob):
            channel = await both_by("socket", ann, bob)
            assert ann.dialer.port is not None
            _, stranger = await asyncio.open_connection("127.0.0.1", ann.dialer.port.port)
            stranger.write(bytes(1000))
            sending = asyncio.create_task(send_numbers(channel, range(200), size=20_000))
            await expect_numbers(bob, range(200), size=20_000)
            await sending
            await until(lambda: ann.dialer.port is not None and ann.dialer.port.turned_away == 1)
            stranger.close()
            cut_socket(channel)
            await until(lambda: channel.report().kind != "socket")
            await channel.send(numbered(200))
            assert (await bob.got()).number == 200

    event_loop.run(life())


async def test_a_port_that_is_taken_is_told_in_one_sentence() -> None:
    async with ends(1, listen=(HERE,)) as (ann,):
        assert ann.dialer.port is not None
        with pytest.raises(SettingsError, match="choose another --listen"):
            async with ends(1, listen=(Listen("127.0.0.1", ann.dialer.port.port),)):
                pass
