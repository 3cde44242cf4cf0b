"""A wide area network in user space: delay, jitter, rate, a queue that overflows, and loss.

`Pipe` is one direction of a line, with the clock given from outside. It has two users: a router process with
cables between network namespaces (`cables`, and `Wan` for just two machines; needs root), and a proxy on
loopback (`Proxy`). The kernel's own tool for this, netem, is missing on many machines that tests run on.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

import msgspec

from shared.background import Background
from tests.harness.commands import python, started
from tests.harness.namespaces import Namespace, namespaces

Packet = TypeVar("Packet")


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What a line does to packets, in each direction."""

    round_trip_ms: float = 0
    """Both directions together, without the time that packets wait and take to be sent."""
    jitter_ms: float = 0
    """Each packet takes up to so much longer, evenly spread."""
    reorders: bool = False
    """Whether jitter lets a packet overtake another."""
    rate_mbit: float = 0
    """Megabits per second; 0 for no limit."""
    queue_ms: float = 100
    """How long a packet may wait to be sent; more and it is dropped. Without a rate nothing waits."""
    loss: float = 0
    """Which share of the packets is lost."""
    seed: int = 0


class Pipe(Generic[Packet]):
    """One direction of a line. The clock is the caller's, in seconds."""

    def __init__(self, line: Line, seed: int = 0) -> None:
        self.line = line
        self.lost = 0
        self.overflowed = 0
        self._chance = random.Random(f"{line.seed} {seed}")
        self._s_per_byte = 8e-6 / line.rate_mbit if line.rate_mbit else 0.0
        self._free_at = 0.0
        self._latest = 0.0
        self._count = 0
        self._under_way: list[tuple[float, int, Packet]] = []

    @property
    def next_at(self) -> float | None:
        """When the next packet arrives, as far as is known."""
        return self._under_way[0][0] if self._under_way else None

    def wait_s(self, now: float) -> float:
        """How long a packet given now would wait until it is sent."""
        return max(0.0, self._free_at - now)

    def put(self, now: float, packet: Packet, size: int, *, careful: bool = False) -> None:
        """A packet enters. A careful one, a piece of a stream, is never lost and overtakes none."""
        line = self.line
        if line.loss and not careful and self._chance.random() < line.loss:
            self.lost += 1
            return
        waits = self.wait_s(now)
        if waits * 1000 > line.queue_ms and not careful:
            self.overflowed += 1
            return
        self._free_at = now + waits + size * self._s_per_byte
        jitter_s = self._chance.random() * line.jitter_ms / 1000 if line.jitter_ms else 0.0
        arrives = self._free_at + line.round_trip_ms / 2000 + jitter_s
        if careful or not line.reorders:
            arrives = max(arrives, self._latest)
        self._latest = max(arrives, self._latest)
        self._count += 1
        heapq.heappush(self._under_way, (arrives, self._count, packet))

    def due(self, now: float) -> Iterator[Packet]:
        """The packets that have arrived by now, each once."""
        while self._under_way and self._under_way[0][0] <= now:
            yield heapq.heappop(self._under_way)[2]


# ---------------------------------------------------------------- between namespaces


class Cable(NamedTuple):
    """A line between two network interfaces, each named with its namespace; both are made here."""

    one: str
    one_interface: str
    other: str
    other_interface: str
    line: Line


@contextmanager
def cables(*wanted: Cable) -> Iterator[None]:
    """Lay cables. The interfaces have no addresses yet and are down; they vanish in the end."""
    plan = msgspec.json.encode(wanted).decode()
    with started(python("tests.harness.wan", plan), says="ready"):
        yield


class Wan:
    """Two machines with a line between them.

    with Wan(Line(round_trip_ms=25, rate_mbit=100)) as wan:
        subprocess.run(wan.left.command("ping", wan.right_address))
    """

    left_address = "192.0.2.1"
    right_address = "192.0.2.2"

    def __init__(self, line: Line) -> None:
        self.line = line
        self.left: Namespace
        self.right: Namespace
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.left, self.right = stack.enter_context(namespaces("left", "right"))
            stack.enter_context(cables(Cable(self.left.name, "wan", self.right.name, "wan", self.line)))
            for end, address in ((self.left, self.left_address), (self.right, self.right_address)):
                end.ip(f"addr add {address}/24 dev wan", "link set wan up")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LONGEST_PACKET = 65536
# Read at one go; packets that are due must not wait for a flood.
_BURST = 32
_PIECE_BYTES = 16 * 1024


def _open_tun(namespace: str, interface: str) -> int:
    """A network interface in a namespace; its packets are read and written here."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _enter(there)
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _IFF_TUN | _IFF_NO_PI))
        return tun
    finally:
        _enter(home)
        os.close(home)
        os.close(there)


def _enter(namespace: int) -> None:
    # os.setns is there from Python 3.12 on.
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def _route(wanted: list[Cable]) -> None:
    """Carry packets until killed."""
    pipes: dict[int, Pipe[bytes]] = {}
    out: dict[int, int] = {}
    for cable in wanted:
        one = _open_tun(cable.one, cable.one_interface)
        other = _open_tun(cable.other, cable.other_interface)
        for number, (enters, leaves) in enumerate(((one, other), (other, one))):
            pipes[enters] = Pipe(cable.line, seed=number)
            out[enters] = leaves
    print("ready", flush=True)
    clock = time.monotonic
    while True:
        upcoming = [pipe.next_at for pipe in pipes.values() if pipe.next_at is not None]
        # select and not epoll, whose time-outs Python rounds up to whole milliseconds.
        wait = max(0.0, min(upcoming) - clock()) if upcoming else None
        for tun in select.select(list(pipes), [], [], wait)[0]:
            for packet in _packets(tun):
                pipes[tun].put(clock(), packet, len(packet))
        for tun, pipe in pipes.items():
            for packet in pipe.due(clock()):
                # A full queue or an interface that is down loses packets, as on any network.
                with suppress(OSError):
                    os.write(out[tun], packet)


def _packets(tun: int) -> Iterator[bytes]:
    with suppress(BlockingIOError):
        for _ in range(_BURST):
            yield os.read(tun, _LONGEST_PACKET)


def main() -> None:
    """The router's process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The kernel may wake us 50 us late otherwise.
    prctl(_PR_SET_TIMERSLACK, 1)
    with suppress(OSError):
        os.nice(-10)
    _route(msgspec.json.decode(sys.argv[1], type=list[Cable]))


# ---------------------------------------------------------------- on loopback


class Proxy:
    """A line on loopback, without root: what is sent to one of its ports comes out at another port.

    Its times are only good to a millisecond. A TCP stream is delayed and slowed down, but loses nothing: what
    a line loses of TCP is repaired below, where no proxy can look.

    async with Proxy(Line(round_trip_ms=25)) as proxy:
        port = await proxy.udp(to=5000)
    """

    def __init__(self, line: Line) -> None:
        self._there, self._back = _Delivery(line, 0), _Delivery(line, 1)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        for delivery in (self._there, self._back):
            delivery.stop()

    async def udp(self, to: int) -> int:
        """A port whose datagrams go to `to`, each sender's from a port of its own, and answers back."""
        loop = asyncio.get_running_loop()
        front = _Front(to, self._there, self._back)
        transport, _ = await loop.create_datagram_endpoint(lambda: front, local_addr=("127.0.0.1", 0))
        self._stack.callback(front.close)
        port: int = transport.get_extra_info("sockname")[1]
        return port

    async def tcp(self, to: int) -> int:
        """A port whose connections go to `to`."""
        tasks = Background()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._stack.callback(writer.close)
            tasks.start(self._join(reader, writer, to)).add_done_callback(lambda _: writer.close())

        listening = await asyncio.start_server(connected, "127.0.0.1", 0)
        await self._stack.enter_async_context(tasks)
        self._stack.callback(listening.close)
        port: int = listening.sockets[0].getsockname()[1]
        return port

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: int) -> None:
        """Both directions of a connection, until both have ended or one of them fails."""
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", to)
        except OSError:
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._there.stream(reader, far_writer))
                tasks.create_task(self._back.stream(far_reader, writer))
        except* OSError:
            pass
        finally:
            far_writer.close()


class _Delivery:
    """A pipe on the event loop's clock: what enters is handed on when it arrives."""

    def __init__(self, line: Line, seed: int) -> None:
        self._queue_s = line.queue_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._pipe: Pipe[Callable[[], None]] = Pipe(line, seed)
        self._timer: asyncio.TimerHandle | None = None

    def put(self, size: int, hand_on: Callable[[], None], *, careful: bool = False) -> None:
        self._pipe.put(self._loop.time(), hand_on, size, careful=careful)
        self._aim()

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry a stream to its end; its sender waits where a packet would find the queue full."""
        gone = asyncio.Event()
        while piece := await reader.read(_PIECE_BYTES):
            await asyncio.sleep(self._pipe.wait_s(self._loop.time()) - self._queue_s)
            self.put(len(piece), partial(writer.write, piece), careful=True)
            # What a slow reader leaves must not pile up here.
            await writer.drain()
        self.put(0, gone.set, careful=True)
        await gone.wait()
        with suppress(OSError):
            writer.write_eof()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _aim(self) -> None:
        self.stop()
        if (at := self._pipe.next_at) is not None:
            self._timer = self._loop.call_at(at, self._hand_on)

    def _hand_on(self) -> None:
        # The loop may call a little early, by its clock's resolution.
        for hand_on in self._pipe.due(self._loop.time() + 0.0005):
            hand_on()
        self._aim()


class _Front(asyncio.DatagramProtocol):
    """The proxy's UDP port; behind it one socket for each address that sends to it."""

    transport: asyncio.DatagramTransport

    def __init__(self, to: int, there: _Delivery, back: _Delivery) -> None:
        self._to = to
        self._there = there
        self._back = back
        self._behind: dict[tuple[str, int], socket.socket] = {}

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        behind = self._behind.get(addr) or self._open(addr)
        self._there.put(len(data), lambda: _send(behind, data))

    def close(self) -> None:
        self.transport.close()
        for behind in self._behind.values():
            asyncio.get_running_loop().remove_reader(behind)
            behind.close()

    def _open(self, addr: tuple[str, int]) -> socket.socket:
        behind = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        behind.setblocking(False)
        behind.connect(("127.0.0.1", self._to))
        self._behind[addr] = behind
        asyncio.get_running_loop().add_reader(behind, self._answered, behind, addr)
        return behind

    def _answered(self, behind: socket.socket, addr: tuple[str, int]) -> None:
        # Without a listener the answer is an error, and the datagram is lost.
        with suppress(OSError):
            data = behind.recv(_LONGEST_PACKET)
            self._back.put(len(data), lambda: self.transport.sendto(data, addr))


def _send(behind: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        behind.send(data)


if __name__ == "__main__":
    main()
