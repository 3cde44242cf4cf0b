"""What a message costs on its way: our channels against raw TCP and stock aiortc, near and far.

Two processes, one way between them at a time, all ways in turn and several times over: compare figures of
one run only. Near is loopback. Far is a line of 25 ms and 100 Mbit/s in user space between two network
namespaces, without and with loss; it needs root, `ip` and `nft`, and is left out where they lack. Last comes
a prompt that fills the far line while single tokens go the same way.

    python -m bench.wire [--rounds 3] [--trips 80] [--mib 16] [--near-only]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from bench.pipes import Forwarder, Kind, Pipe, Place, make_pipe
from relay.app import Relay
from relay.settings import UNLIMITED, RelaySettings
from shared import event_loop
from shared.channel import addresses
from tests.harness.commands import python
from tests.harness.namespaces import why_unavailable
from tests.harness.wan import Line, Wan

NEAR: tuple[Kind, ...] = ("tcp", "forwarded", "stock", "fast", "socket", "relayed")
FAR: tuple[Kind, ...] = ("tcp", "stock", "fast")
LOSSES = (0.0, 0.001, 0.01)
ROUND_TRIP_MS, RATE_MBIT = 25.0, 100.0
SIZES = (1024, 16 * 1024, 64 * 1024)
BULK_PIECE = 16 * 1024
DECODE_BYTES = 8 * 1024
MIXED_S = 4.0
STOCK_SHARE = 4
"""Stock aiortc gets this part of the bytes, so that a run ends."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What one end is to do, one kind after the other."""

    place: Place
    kinds: Sequence[Kind]
    trips: int
    bulk_bytes: int
    mixed: bool = False
    core: int


# ---------------------------------------------------------------- one end


async def answer(pipe: Pipe, control: Connection) -> None:
    """Echo what asks for it, tell when a bulk is whole, and end when told to."""
    over = asyncio.Event()

    def heard(message: bytes | memoryview) -> None:
        match bytes(message[:1]):
            case b"e":
                pipe.reply(bytes(message))
            case b"l":
                pipe.reply(b"n")
            case b"q":
                over.set()

    pipe.on_message = heard
    control.send_bytes(b"ready")
    await over.wait()


class Asker:
    """The measuring end."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._back = asyncio.Event()
        pipe.on_message = lambda _: self._back.set()

    async def trip_ms(self, message: bytes) -> float:
        """One message there and back."""
        self._back.clear()
        started = time.perf_counter()
        await self._pipe.send(message)
        await self._back.wait()
        return (time.perf_counter() - started) * 1000

    async def trips_ms(self, size: int, count: int) -> float:
        """The median of several; the first tenth only warms up."""
        taken = [await self.trip_ms(b"e" * size) for _ in range(count)]
        return statistics.median(taken[count // 10 :])

    async def bulk_mb_s(self, size: int) -> float:
        """Megabytes per second, from the first byte to word that the last one is there."""
        started = time.perf_counter()
        for _ in range(size // BULK_PIECE):
            await self._pipe.send(b"." * BULK_PIECE, urgent=False)
        # In the lane of the bulk, which it must not overtake.
        self._back.clear()
        await self._pipe.send(b"l", urgent=False)
        await self._back.wait()
        return size / (time.perf_counter() - started) / 1e6

    async def mixed(self) -> dict[str, float]:
        """Single tokens there and back, alone and beside a prompt that fills the way."""
        idle = await self.trips_ms(DECODE_BYTES, 40)
        sent = 0

        async def fill() -> None:
            nonlocal sent
            while True:
                await self._pipe.send(b"." * BULK_PIECE, urgent=False)
                sent += BULK_PIECE

        filling = asyncio.create_task(fill())
        await asyncio.sleep(1)
        before, started, taken = sent, time.perf_counter(), []
        while time.perf_counter() < started + MIXED_S:
            taken.append(await self.trip_ms(b"e" * DECODE_BYTES))
        mbit = (sent - before) * 8 / (time.perf_counter() - started) / 1e6
        filling.cancel()
        return {"idle": idle, "mixed": statistics.median(taken), "mbit": mbit}


async def ask(pipe: Pipe, control: Connection, task: Task, kind: Kind) -> dict[str, float]:
    asker = Asker(pipe)
    while await asyncio.to_thread(control.recv_bytes) != b"ready":
        pass
    if task.mixed:
        figures = await asker.mixed()
    else:
        figures = {"rtt0": await asker.trips_ms(1, task.trips)} if kind == "tcp" else {}
        for size in SIZES:
            figures[f"rtt{size // 1024}"] = await asker.trips_ms(size, task.trips)
        figures["bulk"] = await asker.bulk_mb_s(task.bulk_bytes // (STOCK_SHARE if kind == "stock" else 1))
    await pipe.send(b"q")
    await asyncio.sleep(0.2)
    return figures


async def take_part(kind: Kind, control: Connection, task: Task) -> dict[str, float] | None:
    pipe = make_pipe(kind)
    pipe.on_message = lambda _: None
    await pipe.open(control, task.place)
    try:
        if task.place.listens:
            await answer(pipe, control)
            return None
        return await ask(pipe, control, task, kind)
    finally:
        await pipe.close()


def end_main(handle: int, text: str) -> None:
    """One of the two processes. The measuring one prints a JSON line for each kind."""
    # Both ends are on this machine or in namespaces that were made for them.
    addresses.LOOPBACK_TOO = True
    task = msgspec.json.decode(text, type=Task)
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[task.core % len(cores)]})
    control = Connection(handle)
    for kind in task.kinds:
        # The yardsticks as people know them, ours on the loop that our programs run on.
        run = asyncio.run if kind in ("tcp", "forwarded", "stock") else event_loop.run
        figures = run(take_part(kind, control, task))
        if figures is not None:
            print(json.dumps({"kind": kind, **figures}), flush=True)


# ---------------------------------------------------------------- both ends


def relay_main(host: str) -> None:
    """A relay without limits, until killed; its first line is its address, and the port of a forwarder."""

    async def run() -> None:
        settings = RelaySettings(host=host, port=0, participant_bytes=UNLIMITED, address_bytes=UNLIMITED)
        async with Relay(settings) as relay:
            forwarder = await asyncio.get_running_loop().create_server(lambda: Forwarder(host), host, 0)
            print(relay.url, forwarder.sockets[0].getsockname()[1], flush=True)
            await asyncio.Event().wait()

    event_loop.run(run())


@contextmanager
def relay_at(prefix: Sequence[str], host: str) -> Iterator[tuple[str, int]]:
    """Its address, and the port of a forwarder in the same process."""
    command = [*prefix, *python("bench.wire", "--relay", host)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url, forwarder = process.stdout.readline().split()
            yield url, int(forwarder)
        finally:
            process.kill()


def measure(
    kinds: Sequence[Kind],
    options: argparse.Namespace,
    *,
    wan: Wan | None = None,
    relay: tuple[str, int] = ("", 0),
    mixed: bool = False,
) -> Iterator[dict[str, Any]]:
    """Run both ends and give each kind's figures as they come."""
    address = wan.right_address if wan else "127.0.0.1"
    ends = socket.socketpair()
    processes = []
    for core, (listens, end) in enumerate(zip((True, False), ends, strict=True)):
        task = Task(
            place=Place(listens=listens, address=address, relay=relay[0], forwarder=relay[1]),
            kinds=kinds,
            trips=options.trips,
            bulk_bytes=options.mib * 2**20,
            mixed=mixed,
            core=core,
        )
        inside = wan and (wan.right if listens else wan.left)
        command = python("bench.wire", "--end", str(end.fileno()), msgspec.json.encode(task).decode())
        processes.append(
            subprocess.Popen(
                inside.command(*command) if inside else command,
                stdout=subprocess.DEVNULL if listens else subprocess.PIPE,
                pass_fds=[end.fileno()],
                text=True,
            )
        )
    for end in ends:
        end.close()
    try:
        output = processes[1].stdout
        assert output is not None
        for line in output:
            yield json.loads(line)
        if processes[1].wait() != 0:
            raise SystemExit("an end of the wire failed, as it says above")
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Figures:
    """All rounds of one setting: medians by kind and name."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._rounds: dict[str, list[dict[str, float]]] = {}

    def add(self, figures: dict[str, Any]) -> None:
        kind = figures.pop("kind")
        self._rounds.setdefault(kind, []).append(figures)
        row = "  ".join(f"{name} {value:8.2f}" for name, value in figures.items())
        print(f"{self._title:18} {kind:8} {row}", flush=True)

    def __call__(self, kind: Kind, name: str) -> float:
        return statistics.median(figures[name] for figures in self._rounds[kind])

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            kind: {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}
            for kind, rounds in self._rounds.items()
        }


def near(options: argparse.Namespace) -> Figures:
    figures = Figures("loopback")
    with relay_at([], "127.0.0.1") as relay:
        for row in measure(NEAR * options.rounds, options, relay=relay):
            figures.add(row)
    return figures


def far(options: argparse.Namespace, loss: float) -> Figures:
    figures = Figures(f"far, {loss:.1%} loss")
    with Wan(Line(round_trip_ms=ROUND_TRIP_MS, rate_mbit=RATE_MBIT, loss=loss)) as wan:
        for row in measure(FAR * options.rounds, options, wan=wan):
            figures.add(row)
    return figures


def beside_a_prompt(options: argparse.Namespace) -> Figures:
    figures = Figures("beside a prompt")
    with (
        Wan(Line(round_trip_ms=ROUND_TRIP_MS, rate_mbit=RATE_MBIT)) as wan,
        relay_at(wan.right.command(), wan.right_address) as relay,
    ):
        for row in measure(("channel",) * options.rounds, options, wan=wan, relay=relay, mixed=True):
            figures.add(row)
    return figures


def near_ratios(near: Figures) -> dict[str, float]:
    return {
        "rtt16_vs_stock": near("fast", "rtt16") / near("stock", "rtt16"),
        "rtt16_vs_tcp": near("fast", "rtt16") / near("tcp", "rtt16"),
        "bulk_vs_stock": near("fast", "bulk") / near("stock", "bulk"),
        "bulk_vs_tcp": near("fast", "bulk") / near("tcp", "bulk"),
        "relay_rtt16_vs_tcp": near("relayed", "rtt16") / near("tcp", "rtt16"),
        "relay_bulk_vs_tcp": near("relayed", "bulk") / near("tcp", "bulk"),
        "relay_rtt16_vs_forwarded": near("relayed", "rtt16") / near("forwarded", "rtt16"),
        "relay_bulk_vs_forwarded": near("relayed", "bulk") / near("forwarded", "bulk"),
        "forwarded_rtt16_vs_tcp": near("forwarded", "rtt16") / near("tcp", "rtt16"),
        "forwarded_bulk_vs_tcp": near("forwarded", "bulk") / near("tcp", "bulk"),
        "socket_rtt16_vs_tcp": near("socket", "rtt16") / near("tcp", "rtt16"),
        "socket_bulk_vs_tcp": near("socket", "bulk") / near("tcp", "bulk"),
    }


def far_ratios(by_loss: Sequence[Figures], mixed: Figures) -> dict[str, float | list[float]]:
    clean = by_loss[0]
    return {
        "wan_rtt16_vs_path": clean("fast", "rtt16") / clean("tcp", "rtt0"),
        "wan_bulk_vs_tcp": [each("fast", "bulk") / each("tcp", "bulk") for each in by_loss],
        "mixed_decode_vs_idle": mixed("channel", "mixed") / mixed("channel", "idle"),
        "mixed_share": mixed("channel", "mbit") / RATE_MBIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trips", type=int, default=80, help="round trips of each size in a round")
    parser.add_argument("--mib", type=int, default=16, help="MiB of a bulk")
    parser.add_argument("--near-only", action="store_true", help="leave out the far line")
    parser.add_argument("--end", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--relay", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.relay:
        relay_main(options.relay)
    elif options.end:
        end_main(int(options.end[0]), options.end[1])
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    print(
        f"{options.rounds} rounds, {options.trips} trips a size (ms), {options.mib} MiB by 16 KiB (MB/s), "
        f"ours on {event_loop.name()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    found = near(options)
    ratios: dict[str, Any] = near_ratios(found)
    medians = {"loopback": found.medians()}
    why_not = "--near-only" if options.near_only else why_unavailable()
    if why_not:
        print(f"the far line is left out: {why_not}")
    else:
        by_loss = [far(options, loss) for loss in LOSSES]
        mixed = beside_a_prompt(options)
        ratios |= far_ratios(by_loss, mixed)
        medians |= {f"far {loss:.1%}": each.medians() for loss, each in zip(LOSSES, by_loss, strict=True)}
        medians["beside a prompt"] = mixed.medians()
    print(json.dumps({**_rounded(ratios), "medians": medians}))


def _rounded(ratios: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [round(each, 3) for each in value] if isinstance(value, list) else round(value, 3)
        for name, value in ratios.items()
    }


if __name__ == "__main__":
    main()
