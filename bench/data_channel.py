"""How fast a direct link is: round trips and bulk, stock aiortc, ours and raw asyncio TCP side by side.

Two processes on this machine, one link between them at a time, taken in turns and several times, since the
speed of a machine changes by the minute: compare figures of one run only. Stock aiortc and raw TCP run on
asyncio's own loop, ours on the loop that our programs run on, or on the one that --loop names.

    python -m bench.data_channel --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import statistics
import struct
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any, TypeVar, cast

import msgspec

from shared import event_loop
from shared.channel import webrtc
from shared.channel.webrtc import DirectLink, Transports, new_certificate
from shared.protocol import Describe

KINDS = ("stock", "fast", "tcp")
ROUND_TRIP_BYTES = (1024, 16 * 1024, 64 * 1024)
CHUNK_BYTES = 16 * 1024
PIECE_BYTES = 16 * 1024
BUFFER_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")
T = TypeVar("T")


class Pipe(ABC):
    """One way to the other process, with messages of any length. `on_message` gets each."""

    on_message: Callable[[bytes], None]

    @abstractmethod
    async def send(self, message: bytes) -> None:
        """Hand over a message, waiting while the way is full."""

    @abstractmethod
    def send_now(self, message: bytes) -> None:
        """Hand over a message at once."""

    @abstractmethod
    async def close(self) -> None: ...


class DirectPipe(Pipe):
    """A direct link. Messages longer than a frame travel as several, since that is how a channel uses it."""

    def __init__(self, controlling: bool, transports: Transports) -> None:
        self._room = asyncio.Event()
        self._parts: list[bytes] = []
        self._missing = 0
        self.link = DirectLink(
            new_certificate(), controlling, None, self._frame, self._room.set, transports=transports
        )

    async def open(self, control: Connection) -> None:
        control.send_bytes(msgspec.json.encode(await self.link.describe(1)))
        remote = msgspec.json.decode(await asyncio.to_thread(control.recv_bytes), type=Describe)
        await self.link.open(remote)

    async def send(self, message: bytes) -> None:
        while not self.link.ready:
            self._room.clear()
            await self._room.wait()
        self.send_now(message)

    def send_now(self, message: bytes) -> None:
        self.link.send(_LENGTH.pack(len(message)) + message[:PIECE_BYTES])
        for start in range(PIECE_BYTES, len(message), PIECE_BYTES):
            self.link.send(message[start : start + PIECE_BYTES])

    def _frame(self, _: object, frame: bytes) -> None:
        if self._missing == 0:
            (self._missing,) = _LENGTH.unpack_from(frame)
            frame = frame[_LENGTH.size :]
        self._missing -= len(frame)
        if self._missing == 0 and not self._parts:
            self.on_message(frame)
            return
        self._parts.append(frame)
        if self._missing == 0:
            message = b"".join(self._parts)
            self._parts = []
            self.on_message(message)

    async def close(self) -> None:
        await self.link.close()


class TcpPipe(Pipe, asyncio.BufferedProtocol):
    """Raw asyncio TCP with a length before each message, read into one buffer."""

    def __init__(self) -> None:
        self.connected = asyncio.Event()
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._room = asyncio.Event()
        self._room.set()

    async def open(self, control: Connection, controlling: bool) -> None:
        loop = asyncio.get_running_loop()
        if controlling:
            server = await loop.create_server(lambda: self, "127.0.0.1", 0)
            control.send_bytes(str(server.sockets[0].getsockname()[1]).encode())
            await self.connected.wait()
            server.close()
        else:
            port = int(await asyncio.to_thread(control.recv_bytes))
            await loop.create_connection(lambda: self, "127.0.0.1", port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connected.set()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        place = 0
        while self._filled - place >= _LENGTH.size:
            end = place + _LENGTH.size + _LENGTH.unpack_from(self._buffer, place)[0]
            if end > self._filled:
                break
            self.on_message(bytes(self._view[place + _LENGTH.size : end]))
            place = end
        if place:
            rest = self._filled - place
            self._view[:rest] = bytes(self._view[place : self._filled])
            self._filled = rest

    async def send(self, message: bytes) -> None:
        await self._room.wait()
        self.send_now(message)

    def send_now(self, message: bytes) -> None:
        self._transport.writelines([_LENGTH.pack(len(message)), message])

    async def close(self) -> None:
        self._transport.close()


async def _pipe(kind: str, control: Connection, controlling: bool) -> Pipe:
    if kind == "tcp":
        tcp = TcpPipe()
        tcp.on_message = lambda _: None
        await tcp.open(control, controlling)
        return tcp
    direct = DirectPipe(controlling, webrtc.PLAIN if kind == "stock" else webrtc.best_transports())
    await direct.open(control)
    return direct


async def answer(kind: str, control: Connection) -> None:
    """The other process: messages of one length come back, and the last of a bulk is answered."""
    pipe = await _pipe(kind, control, False)
    done = asyncio.Event()

    def echo(message: bytes) -> None:
        if message[:1] == b"e":
            pipe.send_now(message)
        elif message[:1] == b"l":
            pipe.send_now(b"n")
        elif message[:1] == b"q":
            done.set()

    pipe.on_message = echo
    control.send_bytes(b"ready")
    await done.wait()
    await pipe.close()


async def ask(kind: str, control: Connection, trips: int, bulk_bytes: int) -> dict[str, float]:
    """The measuring process. Milliseconds of a round trip by size, megabytes per second of a bulk."""
    pipe = await _pipe(kind, control, True)
    back = asyncio.Event()
    pipe.on_message = lambda _: back.set()
    while await asyncio.to_thread(control.recv_bytes) != b"ready":
        pass
    figures: dict[str, float] = {}
    for size in ROUND_TRIP_BYTES:
        message = b"e" * size
        taken = [await _timed(pipe, back, message) for _ in range(trips)]
        figures[f"rtt{size // 1024}"] = statistics.median(taken[trips // 10 :]) * 1000
    message = b"." * CHUNK_BYTES
    started = time.perf_counter()
    for _ in range(bulk_bytes // CHUNK_BYTES):
        await pipe.send(message)
    await _timed(pipe, back, b"l")
    figures["bulk"] = bulk_bytes / (time.perf_counter() - started) / 1e6
    await pipe.send(b"q")
    await asyncio.sleep(0.1)
    await pipe.close()
    return figures


def _run(kind: str, loop: str, work: Coroutine[Any, Any, T]) -> T:
    return event_loop.run(work) if (kind, loop) == ("fast", "programs") else asyncio.run(work)


async def _timed(pipe: Pipe, back: asyncio.Event, message: bytes) -> float:
    back.clear()
    started = time.perf_counter()
    await pipe.send(message)
    await back.wait()
    return time.perf_counter() - started


def _other_process(control: Connection, kinds: list[str], loop: str) -> None:
    _keep_to_core(1)
    for kind in kinds:
        _run(kind, loop, answer(kind, control))


def _keep_to_core(number: int) -> None:
    """Each process to a core of its own, where the system lets us."""
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def _ratios(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    fast, stock, tcp = (medians[kind] for kind in ("fast", "stock", "tcp"))
    return {
        "rtt16_vs_stock": fast["rtt16"] / stock["rtt16"],
        "rtt16_vs_tcp": fast["rtt16"] / tcp["rtt16"],
        "bulk_vs_stock": fast["bulk"] / stock["bulk"],
        "bulk_vs_tcp": fast["bulk"] / tcp["bulk"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trips", type=int, default=150, help="round trips of each size in a round")
    parser.add_argument("--mib", type=int, default=16, help="MiB of a bulk, a quarter of it for stock aiortc")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--loop", choices=["programs", "asyncio"], default="programs", help="the loop of ours"
    )
    options = parser.parse_args()
    loop = event_loop.name() if options.loop == "programs" else "asyncio"
    print(
        f"{options.rounds} rounds, {options.trips} trips, {options.mib} MiB by 16 KiB, ours on {loop},"
        f" Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    order = options.kinds * options.rounds
    control, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_other_process, args=(other, order, options.loop)
    )
    process.start()
    _keep_to_core(0)
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.kinds}
    try:
        for kind in order:
            bulk_bytes = options.mib * 2**20 // (4 if kind == "stock" else 1)
            figures = _run(kind, options.loop, ask(kind, control, options.trips, bulk_bytes))
            results[kind].append(figures)
            print(
                f"{kind:5}", "  ".join(f"{name} {value:8.2f}" for name, value in figures.items()), flush=True
            )
        process.join(timeout=10)
    finally:
        process.kill()
    medians = {
        kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for kind, runs in results.items()
    }
    last: dict[str, Any] = {"settings": vars(options), "medians": medians}
    if set(options.kinds) == set(KINDS):
        last |= {name: round(value, 3) for name, value in _ratios(medians).items()}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
