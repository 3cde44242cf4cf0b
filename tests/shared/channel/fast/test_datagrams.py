"""At the socket: who is believed, what the kernel joined, and what is left when a system has no offloads."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aioice import stun
from aioice.ice import CandidatePair
from hypothesis import given
from hypothesis import strategies as st

from shared.channel.fast import datagrams
from shared.channel.fast.datagrams import MAX_EARLY, MAX_RUN_BYTES, Port, records_of, runs, stand_before
from shared.channel.fast.dtls import FastDtlsTransport
from shared.channel.fast.sctp import FastSctpTransport
from shared.channel.webrtc import Transports
from tests.harness.direct_links import Side, frames_in, linked, random_frames

STRANGER = ("192.0.2.77", 4000)
FRIEND = ("192.0.2.78", 4000)


def record(length: int, kind: int = 23) -> bytes:
    return bytes([kind, 254, 253, *bytes(8)]) + length.to_bytes(2, "big") + bytes(length)


def question() -> bytes:
    return bytes(stun.Message(message_method=stun.Method.BINDING, message_class=stun.Class.REQUEST))


@given(st.lists(st.one_of(st.integers(0, 2000).map(record), st.builds(question)), max_size=8))
def test_what_the_kernel_joined_is_cut_where_it_was_joined(joined: list[bytes]) -> None:
    cut = runs(b"".join(joined))

    assert [piece for run in cut for piece in (records_of(run.data) if run.records else [run.data])] == joined
    assert [run.records for run in cut if run.records] == [
        len(records_of(run.data)) for run in cut if run.records
    ]
    assert all(len(run.data) <= MAX_RUN_BYTES for run in cut)


def test_no_run_of_records_is_longer_than_openssl_reads() -> None:
    cut = runs(record(1200) * 30)

    assert [run.records for run in cut] == [13, 13, 4]


@given(st.binary(max_size=3000))
def test_nothing_of_a_datagram_is_lost_or_made_up(datagram: bytes) -> None:
    cut = runs(datagram)

    assert b"".join(run.data for run in cut) == datagram
    assert all(run.data for run in cut)


def port_of(side: Side) -> Port:
    pair = side.link._ice._connection._nominated[1]
    port = pair.protocol.transport.get_protocol()
    assert isinstance(port, Port)
    return port


async def exchanged(transports: Transports) -> tuple[Side, Side]:
    """Frames went both ways, whole."""
    async with linked(transports, transports) as (ann, bob):
        sent = await asyncio.gather(
            ann.send_all(random_frames(200_000, seed=1)), bob.send_all(random_frames(200_000, seed=2))
        )
        await asyncio.gather(ann.got(frames_in(200_000, seed=2)), bob.got(frames_in(200_000, seed=1)))
        assert (bob.digest, ann.digest) == tuple(sent)
        return ann, bob


FAST = Transports(FastDtlsTransport, FastSctpTransport, stand_before)


async def test_records_are_read_where_they_arrive() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        assert isinstance(port_of(ann)._reader, FastDtlsTransport)
        assert port_of(bob)._raw is not None


async def test_without_a_port_records_take_the_plain_way() -> None:
    ann, _ = await exchanged(FAST._replace(guard=lambda connection: []))

    assert isinstance(ann.link._dtls, FastDtlsTransport)
    assert ann.link._dtls._port is None


async def test_a_system_without_offloads_sends_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "_OFFLOADS", False)
    await exchanged(FAST)


async def test_a_network_card_that_cuts_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = datagrams._second_handle

    class Refusing(socket.socket):
        def sendmsg(self, *_: Any) -> int:  # noqa: ANN401
            raise OSError("no checksum offload")

    def second_handle(transport: asyncio.DatagramTransport) -> socket.socket:
        return Refusing(fileno=real(transport).detach())

    monkeypatch.setattr(datagrams, "_second_handle", second_handle)
    await exchanged(FAST)


async def test_a_socket_that_is_no_file_is_read_by_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def second_handle(_: asyncio.DatagramTransport) -> socket.socket:
        raise OSError("not a file")

    monkeypatch.setattr(datagrams, "_second_handle", second_handle)
    await exchanged(FAST)


async def test_small_buffers_make_small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "_widened", lambda raw: False)
    async with linked(FAST, FAST) as (ann, bob):
        for side, other in ((ann, bob), (bob, ann)):
            sctp = side.link._sctp
            assert isinstance(sctp, FastSctpTransport)
            assert sctp._outbound is not None
            assert sctp._inbound is not None
            assert sctp._outbound._window_bytes == sctp._inbound.room_bytes == 256 * 1024
            assert not other.link.overrun


async def test_dtls_of_a_stranger_is_not_heard() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        port = port_of(ann)
        heard: list[bytes] = []
        ann.link._dtls.records = lambda records, count: heard.append(records)  # type: ignore[attr-defined]
        port.datagram_received(record(100), STRANGER)
        assert heard == []
        nominated = port.nominated()
        assert nominated is not None
        port.datagram_received(record(100), nominated)
        assert heard == [record(100)]
        del ann.link._dtls.records  # type: ignore[attr-defined]
        await bob.send(b"still here")
        assert await ann.got(1) == [b"still here"]


async def test_before_ice_has_agreed_only_a_few_datagrams_are_kept() -> None:
    side = Side(True, FAST)
    await side.link.describe(1)
    connection = side.link._gatherer._connection
    port = connection._protocols[0].transport.get_protocol()
    assert isinstance(port, Port)
    for _ in range(1000):
        port.datagram_received(record(100, kind=22), STRANGER)
        port.datagram_received(b"\x00" * 40, STRANGER)
        port.datagram_received(b"\x90 no such protocol", STRANGER)
        port.datagram_received(b"", STRANGER)

    assert len(port._early) == MAX_EARLY
    assert connection._queue.empty()
    connection._nominated[1] = cast(CandidatePair, SimpleNamespace(protocol=port._stun, remote_addr=FRIEND))
    port.release()
    assert not port._early
    assert connection._queue.empty(), "none of it came from the address that ICE has found"
    await side.link.close()


async def test_what_the_right_address_sent_early_is_heard() -> None:
    side = Side(True, FAST)
    await side.link.describe(1)
    connection = side.link._gatherer._connection
    port = connection._protocols[0].transport.get_protocol()
    assert isinstance(port, Port)
    port.datagram_received(record(100, kind=22), STRANGER)
    port.datagram_received(record(200, kind=22), FRIEND)
    connection._nominated[1] = cast(CandidatePair, SimpleNamespace(protocol=port._stun, remote_addr=FRIEND))
    port.release()

    assert connection._queue.get_nowait() == (record(200, kind=22), 1)
    assert connection._queue.empty()
    await side.link.close()


async def test_garbage_from_the_right_address_is_survived() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        port = port_of(ann)
        nominated = port.nominated()
        assert nominated is not None
        for garbage in (
            record(50),
            record(0),
            b"\x17",
            b"\x17" * 12,
            b"\x00",
            record(9)[:-4],
            record(20, 21),
        ):
            port.datagram_received(garbage + record(30) + question(), nominated)
        await bob.send(b"still here")

        assert await ann.got(1) == [b"still here"]


async def test_a_port_whose_socket_is_gone_sends_nothing() -> None:
    async with linked(FAST, FAST) as (ann, _):
        port = port_of(ann)
        port._transport.abort()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

        assert port._raw is None
        ann.link.send(b"into the void")
