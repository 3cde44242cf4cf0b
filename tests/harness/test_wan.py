"""The wide area network does to packets what its line says."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.harness.namespaces import why_unavailable
from tests.harness.wan import Line, Pipe, Proxy, Wan


def arrivals(pipe: Pipe[int], times_s: Sequence[float], size: int = 1250) -> dict[int, float]:
    """When each of the packets given at these times arrives, in the order of their arrival."""
    for number, at in enumerate(times_s):
        pipe.put(at, number, size)
    arrived = {}
    while (at := pipe.next_at) is not None:  # type: ignore[assignment]
        arrived.update(dict.fromkeys(pipe.due(at), at))
    return arrived


def test_a_packet_takes_half_a_round_trip() -> None:
    pipe: Pipe[int] = Pipe(Line(round_trip_ms=50))
    pipe.put(1.0, 7, 1500)
    assert pipe.next_at == pytest.approx(1.025)
    assert list(pipe.due(1.024)) == []
    assert list(pipe.due(1.026)) == [7]
    assert pipe.next_at is None


def test_packets_are_sent_one_after_the_other() -> None:
    # 1250 bytes are 10 000 bits: a millisecond at 10 Mbit/s.
    arrived = arrivals(Pipe(Line(round_trip_ms=20, rate_mbit=10)), [0.0, 0.0, 0.0, 0.1])
    assert list(arrived.values()) == pytest.approx([0.011, 0.012, 0.013, 0.111])


def test_a_full_queue_drops_what_comes_last() -> None:
    pipe: Pipe[int] = Pipe(Line(rate_mbit=10, queue_ms=5))
    arrived = arrivals(pipe, [0.0] * 20)
    assert list(arrived) == [0, 1, 2, 3, 4, 5]
    assert pipe.overflowed == 14


def test_jitter_spreads_packets_and_keeps_their_order_unless_told_otherwise() -> None:
    times = [number / 1000 for number in range(200)]
    kept = arrivals(Pipe(Line(jitter_ms=20)), times)
    mixed = arrivals(Pipe(Line(jitter_ms=20, reorders=True)), times)
    assert list(kept) == sorted(kept)
    assert list(mixed) != sorted(mixed)
    assert all(0 <= mixed[number] - at <= 0.02 for number, at in enumerate(times))


def test_loss_is_what_was_asked_for_and_the_same_every_time() -> None:
    def survivors(seed: int) -> list[int]:
        return list(arrivals(Pipe(Line(loss=0.1, seed=seed)), [0.0] * 10_000))

    assert 8_800 < len(survivors(1)) < 9_200
    assert survivors(1) == survivors(1) != survivors(2)


def test_a_stream_is_neither_lost_nor_reordered() -> None:
    pipe: Pipe[int] = Pipe(Line(loss=0.5, jitter_ms=20, reorders=True, rate_mbit=1, queue_ms=1))
    for number in range(100):
        pipe.put(0.0, number, 1000, careful=True)
    assert list(pipe.due(1e9)) == list(range(100))


# ---------------------------------------------------------------- by proxy


async def test_datagrams_cross_a_proxy_and_come_back() -> None:
    async with Proxy(Line(round_trip_ms=40)) as proxy:
        with udp() as echo, udp() as ann, udp() as bob:
            port = await proxy.udp(to=echo.getsockname()[1])
            loop = asyncio.get_running_loop()
            started = loop.time()
            for asker in (ann, bob):
                await loop.sock_sendto(asker, asker.getsockname()[1].to_bytes(2), ("127.0.0.1", port))
            for _ in (ann, bob):
                data, sender = await loop.sock_recvfrom(echo, 2048)
                await loop.sock_sendto(echo, data, sender)
            for asker in (ann, bob):
                assert await loop.sock_recv(asker, 2048) == asker.getsockname()[1].to_bytes(2)
            assert loop.time() - started >= 0.039


def udp() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setblocking(False)
    made.bind(("127.0.0.1", 0))
    return made


async def test_a_stream_crosses_a_proxy_whole_and_no_faster_than_its_line() -> None:
    sent = bytes(range(256)) * 2000

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    far = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with far, Proxy(Line(round_trip_ms=20, rate_mbit=40)) as proxy:
        port = await proxy.tcp(to=far.sockets[0].getsockname()[1])
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        writer.write_eof()
        assert await reader.read() == sent
        writer.close()
        # Each direction takes 102 ms to send half a megabyte.
        assert time.monotonic() - started >= 2 * 0.102 + 0.02


async def test_leaving_a_proxy_ends_its_connections() -> None:
    reached = asyncio.Event()
    async with await asyncio.start_server(lambda reader, writer: reached.set(), "127.0.0.1", 0) as far:
        async with Proxy(Line()) as proxy:
            port = await proxy.tcp(to=far.sockets[0].getsockname()[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await reached.wait()
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_to_nobody_is_closed() -> None:
    async with Proxy(Line()) as proxy:
        with socket.socket() as unheard:
            unheard.bind(("127.0.0.1", 0))
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", await proxy.tcp(unheard.getsockname()[1])
            )
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()


# ---------------------------------------------------------------- between namespaces

ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ears:
    ears.bind((sys.argv[1], 5000))
    print("listening", flush=True)
    while True:
        ears.sendto(*ears.recvfrom(2048))
"""
ASK = """
import json, socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
    asker.settimeout(0.3)
    trips, lost = [], 0
    for number in range(int(sys.argv[2])):
        started = time.perf_counter()
        asker.sendto(number.to_bytes(4), (sys.argv[1], 5000))
        try:
            while asker.recv(2048) != number.to_bytes(4):
                pass
            trips.append((time.perf_counter() - started) * 1000)
        except TimeoutError:
            lost += 1
    print(json.dumps([trips, lost]))
"""
TAKE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 5001)) as ears:
    print("listening", flush=True)
    taker, _ = ears.accept()
    taken, started = len(taker.recv(1 << 20)), time.perf_counter()
    while piece := taker.recv(1 << 20):
        taken += len(piece)
    print(taken * 8e-6 / (time.perf_counter() - started))
"""
GIVE = """
import socket, sys
with socket.create_connection((sys.argv[1], 5001)) as giver:
    giver.sendall(bytes(int(sys.argv[2])))
"""


def trips_ms(wan: Wan, count: int) -> tuple[list[float], int]:
    """Round trips of small datagrams, and how many got lost."""
    with listening(wan, ECHO):
        asked = subprocess.run(
            wan.left.command(*script(ASK, wan.right_address, str(count))),
            capture_output=True,
            check=True,
        )
    trips, lost = json.loads(asked.stdout)
    return trips, lost


def rate_mbit(wan: Wan, size: int) -> float:
    """How fast one TCP connection carries so many bytes."""
    with listening(wan, TAKE) as taker:
        subprocess.run(wan.left.command(*script(GIVE, wan.right_address, str(size))), check=True)
        assert taker.stdout is not None
        return float(taker.stdout.readline())


@contextmanager
def listening(wan: Wan, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process on the right that says when it is ready."""
    command = wan.right.command(*script(code, wan.right_address))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            yield process
        finally:
            process.kill()


def script(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *arguments]


@pytest.fixture
def needs_namespaces() -> None:
    if why := why_unavailable():
        pytest.skip(why)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_namespaces")
@pytest.mark.parametrize(
    ("line", "size"),
    [
        (Line(round_trip_ms=25, rate_mbit=100), 20_000_000),
        (Line(round_trip_ms=100, rate_mbit=20), 5_000_000),
        (Line(round_trip_ms=25, jitter_ms=4), 20_000_000),
        (Line(), 50_000_000),
    ],
)
def test_two_namespaces_are_as_far_apart_as_asked_for(line: Line, size: int) -> None:
    with Wan(line) as wan:
        trips, _ = trips_ms(wan, 40)
        rate = rate_mbit(wan, size)
    print(
        f"{line}: round trip min {min(trips):.1f} median {statistics.median(trips):.1f}"
        f" max {max(trips):.1f} ms, TCP {rate:.1f} Mbit/s"
    )
    # The quickest shows what the line does; the others also wait for a busy machine.
    assert line.round_trip_ms <= min(trips) < line.round_trip_ms + 2 * line.jitter_ms + 10
    if line.rate_mbit:
        assert 0.25 * line.rate_mbit < rate < line.rate_mbit


@pytest.mark.slow
@pytest.mark.usefixtures("needs_namespaces")
def test_a_lossy_line_loses_packets_between_namespaces() -> None:
    with Wan(Line(loss=0.3, seed=4)) as wan:
        trips, lost = trips_ms(wan, 40)
    assert len(trips) > 5 and lost > 5
