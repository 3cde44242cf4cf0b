"""The port where the other ends of channels call, as strangers find it; and what is tried of what is told."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec
import pytest

from shared.channel import Listen, addresses, listening, sockets, tcp
from shared.channel.addresses import MAX_ADDRESSES, Address, Interface, parse_listen, worth_trying
from shared.channel.listening import MAX_HALF_OPEN_PER_NETWORK, ListeningPort, network_of
from shared.channel.tcp import HELLO_BYTES, LENGTH, NONCE_BYTES, TAG_AT
from shared.errors import ConnectionLost, SettingsError
from shared.identity import Identity, PeerId
from shared.protocol import Listening
from tests.harness.evil_relay import EvilRelay
from tests.shared.channel.ends import (
    End,
    both_by,
    ends,
    expect_numbers,
    numbered,
    send_numbers,
    until,
)

HERE = Listen("127.0.0.1")


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "LOOPBACK_TOO", True)


@pytest.fixture
async def port() -> AsyncIterator[ListeningPort]:
    async with ListeningPort(HERE) as port:
        yield port


Stranger = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def call(port: ListeningPort | None) -> Stranger:
    assert port is not None
    return await asyncio.open_connection("127.0.0.1", port.port)


async def heard(stranger: Stranger) -> bytes:
    """All that the port ever says to a connection; returns when that has ended."""
    reader, writer = stranger
    said = bytearray()
    try:
        async with asyncio.timeout(5):
            while part := await reader.read(1000):
                said += part
    except ConnectionError:
        pass
    writer.close()
    return bytes(said)


def like_a_hello() -> bytes:
    noise = secrets.token_bytes(HELLO_BYTES)
    return noise[:NONCE_BYTES] + LENGTH.pack(HELLO_BYTES - TAG_AT) + noise[TAG_AT:]


# ---------------------------------------------------------------- strangers


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        secrets.token_bytes(HELLO_BYTES),
        secrets.token_bytes(200_000),
        like_a_hello(),
        like_a_hello() + b"more",
        bytes(NONCE_BYTES) + LENGTH.pack(0xFFFF_FFFF),
    ],
    ids=["HTTP", "noise", "much noise", "like a hello", "like a hello and more", "an endless hello"],
)
async def test_whoever_says_anything_else_is_cut_off_without_a_word(
    port: ListeningPort, words: bytes
) -> None:
    stranger = await call(port)
    stranger[1].write(words)

    assert await heard(stranger) == b""
    assert port.turned_away == 1
    assert not port.half_open


async def test_whoever_says_nothing_is_cut_off_soon(
    port: ListeningPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "HELLO_S", 0.05)
    silent = await call(port)

    assert await heard(silent) == b""


async def test_whoever_speaks_byte_by_byte_has_no_more_time(
    port: ListeningPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "HELLO_S", 0.1)
    slow = await call(port)

    async def drip() -> None:
        for byte in like_a_hello():
            slow[1].write(bytes([byte]))
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    assert await heard(slow) == b""
    dripping.cancel()
    assert port.turned_away == 1


async def test_few_may_be_half_open_at_once_and_the_next_may_come_when_they_are_gone(
    port: ListeningPort,
) -> None:
    first = [await call(port) for _ in range(MAX_HALF_OPEN_PER_NETWORK)]
    await until(lambda: port.half_open.total() == MAX_HALF_OPEN_PER_NETWORK)
    for stranger in [await call(port) for _ in range(50)]:
        assert await heard(stranger) == b""
    assert port.turned_away == 50
    assert port.half_open.total() == MAX_HALF_OPEN_PER_NETWORK

    for _, writer in first:
        writer.close()
    await until(lambda: not port.half_open)


async def test_a_flood_of_strangers_leaves_an_open_socket_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ends(listen=(HERE, None)) as (ann, bob):
        channel = await both_by("socket", ann, bob)
        sending = asyncio.create_task(send_numbers(channel, range(300)))
        strangers = [await call(ann.dialer.port) for _ in range(100)]
        for _, writer in strangers:
            writer.write(like_a_hello())
        assert {await heard(stranger) for stranger in strangers} == {b""}
        await expect_numbers(bob, range(300))
        await sending

        assert channel.report().kind == "socket"


async def test_all_callers_of_one_ipv6_home_count_together() -> None:
    assert network_of(("2001:db8::1", 1)) == network_of(("2001:db8::ffff", 2))
    assert network_of(("2001:db8::1", 1)) != network_of(("2001:db8:0:1::1", 1))
    assert network_of(("::ffff:192.0.2.1", 1)) == network_of(("192.0.2.1", 2)) == "192.0.2.1"


class Tap:
    """Stands between two ends on the network: hears everything, and may change it."""

    def __init__(self) -> None:
        self.said: list[bytes] = []
        """What each connection's dialling side sent."""
        self.answered: list[bytes] = []
        self.alter: Callable[[bytes], bytes] = lambda data: data
        self.opened: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        number = len(self.said)
        self.said.append(b"")
        self.answered.append(b"")

        async def pour(source: asyncio.StreamReader, sink: asyncio.StreamWriter, into: list[bytes]) -> None:
            try:
                while data := await source.read(65536):
                    into[number] += data
                    sink.write(self.alter(data))
            except ConnectionError:
                pass
            finally:
                sink.close()

        self.opened.put_nowait(writer)
        await asyncio.gather(pour(reader, back, self.said), pour(there, writer, self.answered))

    target = 0


async def tapped(one: End, other: End) -> tuple[Tap, asyncio.Server]:
    """`one` listens, and `other` reaches it only through a tap."""
    tap = Tap()
    server = await asyncio.start_server(tap.serve, "127.0.0.1", 0)
    port = one.dialer.port
    assert port is not None
    tap.target = port.port

    async def addresses(interfaces: frozenset[Interface]) -> list[Address]:
        return [Address("127.0.0.1", server.sockets[0].getsockname()[1])]

    port.addresses = addresses  # type: ignore[method-assign]
    return tap, server


async def shut(server: asyncio.Server) -> None:
    server.close()
    await server.wait_closed()


async def test_who_listens_on_the_way_hears_noise_and_gains_nothing_by_saying_it_again() -> None:
    async with ends(listen=(HERE, None)) as (ann, bob):
        tap, server = await tapped(ann, bob)
        channel = await both_by("socket", ann, bob)
        await channel.send(numbered(1), b"a very private message")
        await bob.got()
        await bob.channel_to(ann).send(numbered(2), b"a very private answer")
        await ann.got()

        for words in (tap.said[0], tap.answered[0]):
            assert len(words) > HELLO_BYTES
            for secret in (b"private", b"token", b"corolla", b"ping"):
                assert secret not in words
        for words in (tap.said[0][:HELLO_BYTES], tap.said[0]):
            stranger = await call(ann.dialer.port)
            stranger[1].write(words)
            assert await heard(stranger) == b""
        assert len(channel._sockets.links) == 1
        await channel.send(numbered(3))
        assert (await bob.got()).path == "direct"
        for end in (ann, bob):
            await end.dialer.__aexit__(None, None, None)
        await shut(server)


async def test_a_hello_that_never_arrived_opens_nothing_that_carries_messages() -> None:
    """Whoever keeps a hello back and says it later speaks for nobody: it cannot seal another word."""
    async with ends(listen=(HERE, None)) as (ann, bob):
        tap, server = await tapped(ann, bob)
        kept: list[bytes] = []

        def keep(data: bytes) -> bytes:
            kept.append(data)
            return b""

        tap.alter = keep
        channel = await ann.dialer.channel(bob.id)
        await until(lambda: sum(map(len, kept)) >= HELLO_BYTES)
        stranger = await call(ann.dialer.port)
        stranger[1].write(b"".join(kept)[:HELLO_BYTES])
        await until(lambda: channel.socket is not None)
        await channel.send(numbered(1))
        await bob.got()

        assert channel.report().kind != "socket"
        stranger[1].write(bytes(1000))
        await heard(stranger)
        await until(lambda: channel.socket is None)
        for end in (ann, bob):
            await end.dialer.__aexit__(None, None, None)
        await shut(server)


async def test_a_stream_survives_those_who_change_a_bit_on_the_way() -> None:
    async with ends(listen=(HERE, None)) as (ann, bob):
        tap, server = await tapped(ann, bob)
        channel = await both_by("socket", ann, bob)
        with channel.watched():
            sending = asyncio.create_task(send_numbers(channel, range(300), pause_s=0.001))
            await until(lambda: bob.inbox.qsize() > 30)
            tap.alter = lambda data: bytes([data[0] ^ 1]) + data[1:]
            await expect_numbers(bob, range(300))
            await sending

        assert channel.report().kind != "socket"
        for end in (ann, bob):
            await end.dialer.__aexit__(None, None, None)
        await shut(server)


async def test_no_port_is_opened_by_a_side_that_stays_on_the_relay() -> None:
    async with ends(direct=False, listen=(HERE, HERE)) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)

        assert ann.dialer.port is bob.dialer.port is None
        assert channel.report().why == "this side wants no direct links"


async def test_a_relay_sees_no_addresses_and_cannot_change_them() -> None:
    relay = EvilRelay()
    seen: list[bytes] = []

    def alter(sender: PeerId, receiver: PeerId, sealed: bytes) -> Iterable[bytes]:
        """Every other frame is changed, and then told as it was."""
        seen.append(sealed)
        if len(seen) % 2:
            yield sealed[:-1] + bytes([sealed[-1] ^ 1])
        yield sealed

    relay.frames = alter
    made = []
    for number in range(2):
        identity = Identity.generate()
        listen = HERE if number == 0 else None
        made.append(End(identity, relay.connect(identity), listen=listen))
    ann, bob = made
    async with ann.dialer, bob.dialer:
        await both_by("socket", ann, bob)
        assert ann.dialer.port is not None
        everything = b"".join(seen)
        for secret in (b"127.0.0.1", str(ann.dialer.port.port).encode(), b"ticket", b"listening"):
            assert secret not in everything
        theirs = bob.channel_to(ann)._sockets._theirs
        assert theirs is not None
        assert theirs.addresses == [f"127.0.0.1:{ann.dialer.port.port}"]


# ---------------------------------------------------------------- what we are told


OURS = [ipaddress.ip_interface("192.168.1.20/24"), ipaddress.ip_interface("fd12:3456::20/64")]


@pytest.mark.parametrize(
    "told",
    [
        "192.168.1.30:4001",
        "[fd12:3456::30]:4001",
        "8.8.8.8:4001",
        "[2600:1900::1]:4001",
        "8.8.8.8:1024",
    ],
)
def test_public_addresses_and_those_of_our_own_networks_are_tried(told: str) -> None:
    assert [str(address) for address in worth_trying([told], OURS)] == [told]


@pytest.mark.parametrize(
    "told",
    [
        "",
        "nonsense",
        "printer.local:4001",
        "8.8.8.8",
        "8.8.8.8:http",
        "8.8.8.8:+4001",
        "8.8.8.8:70000",
        "8.8.8.8:0",
        "8.8.8.8:22",
        "8.8.8.8:443",
        "192.168.2.30:4001",
        "10.0.0.1:4001",
        "172.17.0.1:4001",
        "100.64.0.1:4001",
        "[fd99::1]:4001",
        "169.254.169.254:4001",
        "[fe80::1]:4001",
        "[fe80::1%eth0]:4001",
        "127.0.0.1:4001",
        "[::1]:4001",
        "0.0.0.0:4001",
        "[::]:4001",
        "224.0.0.1:4001",
        "255.255.255.255:4001",
        "[ff02::1]:4001",
        "[::ffff:10.0.0.1]:4001",
        "[64:ff9b::10.0.0.1]:4001",
        "[2002:a00:1::1]:4001",
    ],
)
def test_addresses_that_a_stranger_may_not_choose_for_us_are_left_out(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "LOOPBACK_TOO", False)
    assert worth_trying([told], OURS) == []


def test_only_so_many_addresses_are_tried_each_once_and_the_near_ones_first() -> None:
    assert len(worth_trying([f"8.8.8.{number}:4001" for number in range(100)], OURS)) == MAX_ADDRESSES
    tried = worth_trying(["8.8.8.8:4001", "192.168.1.30:4001", "8.8.8.8:4001"], OURS)
    assert [str(address) for address in tried] == ["192.168.1.30:4001", "8.8.8.8:4001"]


def test_addresses_of_this_machine_alone_are_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "LOOPBACK_TOO", False)
    for interface in addresses.local_interfaces():
        assert not interface.ip.is_loopback
        assert not interface.ip.is_link_local


async def test_a_partner_that_tells_many_addresses_again_and_again_makes_us_dial_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialled: list[Address] = []

    async def dial(address: Address, *_: object) -> None:
        dialled.append(address)
        raise ConnectionLost("nobody there")

    monkeypatch.setattr(sockets, "dial", dial)
    async with ends() as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await until(lambda: bob.dialer.channels)
        for number in range(50):
            many = [f"8.8.{number}.{last}:4001" for last in range(8)]
            channel._tell(channel.relayed, Listening(secrets.token_hex(16), many))
        await until(lambda: len(dialled) == MAX_ADDRESSES)
        await channel.send(numbered(1))
        await bob.got()

        assert len(dialled) == MAX_ADDRESSES


async def test_a_stranger_s_service_that_we_were_sent_to_hears_noise_and_that_is_all() -> None:
    heard_there = bytearray()
    done = asyncio.Event()

    async def service(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard_there.extend(await reader.readexactly(HELLO_BYTES))
        writer.write(b"220 mail.example ESMTP ready, go on\r\n" * 10)
        heard_there.extend(await reader.read())
        writer.close()
        done.set()

    server = await asyncio.start_server(service, "127.0.0.1", 0)
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    with pytest.raises(ConnectionLost, match="not the peer"):
        await tcp.dial(address, b"s" * 32, b"t" * 16, lambda link, frame: None, lambda: None)
    await done.wait()
    await shut(server)

    assert len(heard_there) == HELLO_BYTES
    assert b"corolla" not in heard_there


# ---------------------------------------------------------------- what people set


def test_where_to_listen_is_read_from_few_words() -> None:
    assert parse_listen("0") == Listen("", 0)
    assert parse_listen("4001") == Listen("", 4001)
    assert parse_listen("192.168.1.5:4001") == Listen("192.168.1.5", 4001)
    assert parse_listen("[::]:4001") == Listen("::", 4001)
    assert parse_listen("off") is None
    assert parse_listen("4001", ["home.example:4001", "[2001:db8::1]:5000"]) == Listen(
        "", 4001, (("home.example", 4001), ("2001:db8::1", 5000))
    )


@pytest.mark.parametrize(
    ("listen", "advertise"),
    [
        ("somewhere", []),
        ("home.example:4001", []),
        ("70000", []),
        ("-1", []),
        ("::1:4001", []),
        ("4001", ["home.example"]),
        ("4001", ["home.example:80"]),
        ("4001", ["home.example:0"]),
        ("4001", [":4001"]),
        ("off", ["home.example:4001"]),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(listen: str, advertise: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"--listen|--advertise"):
        parse_listen(listen, advertise)


async def test_an_advertised_name_is_told_as_numbers_and_first() -> None:
    async with ListeningPort(Listen("127.0.0.1", 0, (("127.0.0.1", 4001), ("no.such.invalid", 1)))) as port:
        told = await port.addresses(frozenset())

    assert told == [Address("127.0.0.1", 4001), Address("127.0.0.1", port.port)]


def test_a_listening_message_holds_few_addresses() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"ticket": "00" * 16, "addresses": ["a"] * 9}, Listening)
