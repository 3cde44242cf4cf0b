"""What thousands of peers cost one relay process, and what they lose when it restarts.

The relay runs as its own process, `python -m relay` with an SQLite file; another process simulates peers
that renew their announcements, dial each other through the relay (an offer and an answer make a handshake)
and look models up. Then the relay is told to end under that load, started anew from its file, and everyone
has to be back. Times contain the simulation's own; where others use the machine, put `chrt -f 1` in front.

    python -m bench.relay --peers 5000 --handshakes 500

Per-address limits are lifted, since all peers are on this machine; those for each participant stay. `lost`
counts handshakes that were never answered, peers that did not return and announcements that are not found.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec import Struct

from bench.light_peers import DIALLING_AT_ONCE, LightPeer
from shared.announcement import RENEW_EVERY_S
from shared.background import Background
from shared.identity import PeerId
from shared.protocol import Announcement, Found, Lookup, Signal, SignedRecord, decode

LOOKERS = 8
TICK_S = 0.02
# The dialler of a channel gives up after 5 s; until then it offers again whenever a relay is back.
OFFER_AGAIN_S = 2.0
PATIENCE_S = 60.0
ON_ITS_WAY_S = 1.0
"""What was said a moment ago has arrived after this."""
# About as long as a signed greeting: docs/decisions/0003-channel-handshake.md.
GREETING_BYTES = 420
SIGNATURE = "5" * 128
LIFTED = [
    *("--address-connections", "100000", "--address-new-connections", "0"),
    *("--address-announcements", "0", "--address-bytes", "0"),
]


class Handshake(Struct):
    """One offer that waits for its answer."""

    caller: LightPeer
    callee: LightPeer
    started: float
    offered: float


class RelayProcess:
    """The relay under test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, on the same port and file as before if it ran already."""
        command = [
            sys.executable,
            "-m",
            "relay",
            "--port",
            str(self.port),
            "--no-stun",
            "--log-level",
            "error",
        ]
        command += ["--database", str(self._folder / "relay.sqlite"), *LIFTED]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.search(r":(\d+)", line)
        if found is None:
            raise SystemExit(f"the relay did not start: {line}")
        self.port = int(found[1])

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE_S)

    def kept(self) -> dict[PeerId, int]:
        """Whom the file of a relay that has ended knows, with the sequence of each."""
        with contextlib.closing(sqlite3.connect(self._folder / "relay.sqlite")) as file:
            return dict(file.execute("select peer, sequence from spans"))

    def rss_kib(self) -> float:
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return float(_ps(self.pid, "rss"))
        return float(status.partition("VmRSS:")[2].split()[0])

    def cpu_s(self) -> float:
        """Processor time so far; by `ps` in whole seconds."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float(_ps(self.pid, "times"))
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ps(pid: int, column: str) -> str:
    """For systems without /proc."""
    return subprocess.run(
        ["ps", "-o", f"{column}=", "-p", str(pid)], capture_output=True, text=True, check=True
    ).stdout.strip()


class Crowd:
    """The simulated peers and what they noted."""

    def __init__(self, url: str, count: int, models: int, chance: random.Random) -> None:
        dialling = asyncio.Semaphore(DIALLING_AT_ONCE)
        self.peers = [LightPeer(url, dialling, self._heard) for _ in range(count)]
        self.lookers = [LightPeer(url, dialling, self._found) for _ in range(LOOKERS)]
        self.lookup_ms: list[float] = []
        self.handshake_ms: list[float] = []
        self.started = 0
        self.offered_again = 0
        self.open: dict[int, Handshake] = {}
        self.lag_ms: list[float] = []
        """How late this process itself was, which every time above contains."""
        self._models = [f"model {number}" for number in range(models)]
        self._chance = chance
        self._by_id = {peer.identity.id: peer for peer in self.peers}
        self._answers: dict[LightPeer, asyncio.Future[list[SignedRecord]]] = {}
        self._parts: dict[LightPeer, list[bytes]] = {}

    async def arrive(self, tasks: Background) -> None:
        """Everybody connects and announces."""
        for peer in (*self.peers, *self.lookers):
            tasks.start(peer.stay())
        for number, peer in enumerate(self.peers):
            await peer.back.wait()
            self._announce(number)
        for looker in self.lookers:
            await looker.back.wait()

    def _announce(self, number: int) -> None:
        start = number // len(self._models) * 8 % 80
        self.peers[number].announce(self._models[number % len(self._models)], (start, start + 8))

    # ------------------------------------------------------------ load

    async def renew(self) -> None:
        """Each peer once in RENEW_EVERY_S, evenly spread, until cancelled."""
        due, number = time.monotonic(), 0
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += RENEW_EVERY_S / len(self.peers)
            self._announce(number % len(self.peers))
            number += 1

    async def dial(self, per_s: float) -> None:
        """Handshakes between any two at a steady rate, until cancelled."""
        due = time.monotonic()
        owed = 0.0
        while True:
            due += TICK_S
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.lag_ms.append((time.monotonic() - due) * 1000)
            owed += per_s * TICK_S
            for _ in range(int(owed)):
                self._begin(*self._chance.sample(self.peers, 2))
            owed %= 1

    async def insist(self) -> None:
        """Offer again what was not answered, as a dialler does whose relay was away; until cancelled."""
        while True:
            await asyncio.sleep(OFFER_AGAIN_S / 4)
            now = time.monotonic()
            for number, handshake in self.open.items():
                both = handshake.caller.ready and handshake.callee.ready
                if both and now - handshake.offered > OFFER_AGAIN_S:
                    handshake.offered = now
                    self.offered_again += 1
                    self._offer(number, handshake)

    async def look(self, per_s: float) -> None:
        """Look models up, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for looker in self.lookers:
                tasks.create_task(self._look(looker, LOOKERS / per_s))

    async def _look(self, looker: LightPeer, pause_s: float) -> None:
        while True:
            await asyncio.sleep(pause_s * (0.5 + self._chance.random()))
            started = time.perf_counter()
            await self.lookup(looker, self._chance.choice(self._models))
            self.lookup_ms.append((time.perf_counter() - started) * 1000)

    def _begin(self, caller: LightPeer, callee: LightPeer) -> None:
        if not (caller.ready and callee.ready):
            return
        now = time.monotonic()
        self.started += 1
        handshake = self.open[self.started] = Handshake(caller, callee, now, now)
        self._offer(self.started, handshake)

    def _offer(self, number: int, handshake: Handshake) -> None:
        handshake.caller.send(
            Signal(handshake.callee.identity.id, _greeting("offer", number, handshake.caller.identity.id))
        )

    def _heard(self, peer: LightPeer, text: bytes) -> None:
        if not text.startswith(b'{"type":"signal"'):
            return  # Somebody went, and is offered again when it is back.
        kind, number, caller = decode(text, Signal).record.body.split(" ")[:3]
        if kind == "offer":
            peer.send(Signal(caller, _greeting("answer", int(number), peer.identity.id)))
        elif (handshake := self.open.pop(int(number), None)) is not None:
            self.handshake_ms.append((time.monotonic() - handshake.started) * 1000)

    # ------------------------------------------------------------ looking

    async def lookup(self, looker: LightPeer, model: str | None) -> list[bytes]:
        """The parts of an answer, unread."""
        await looker.back.wait()
        parts = self._parts[looker] = []
        done = self._answers[looker] = asyncio.get_running_loop().create_future()
        looker.send(Lookup(request=1, model=model))
        async with asyncio.timeout(PATIENCE_S):
            await done
        return parts

    def _found(self, looker: LightPeer, text: bytes) -> None:
        if text.startswith(b'{"type":"found"') and looker in self._parts:
            self._parts[looker].append(text)
            if text.endswith(b'"more":false}') and not self._answers[looker].done():
                self._answers[looker].set_result([])

    async def missing(self, wanted: dict[PeerId, int]) -> int:
        """How many of these peers a relay does not show with this sequence or a later one."""
        shown: dict[PeerId, int] = {}
        for part in await self.lookup(self.lookers[0], None):
            for record in decode(part, Found).records:
                said = decode(record.body, Announcement)
                shown[said.peer] = said.sequence
        return sum(shown.get(peer, -1) < sequence for peer, sequence in wanted.items())

    def announced(self) -> dict[PeerId, int]:
        """The newest sequence of each peer."""
        return {
            peer.identity.id: decode(peer.record.body, Announcement).sequence
            for peer in self.peers
            if peer.record is not None
        }


def _greeting(kind: str, number: int, sender: PeerId) -> SignedRecord:
    return SignedRecord(f"{kind} {number} {sender} ".ljust(GREETING_BYTES, "x"), SIGNATURE)


@asynccontextmanager
async def started_relay() -> AsyncGenerator[RelayProcess, None]:
    with tempfile.TemporaryDirectory(prefix="corolla-bench-") as folder:
        relay = RelayProcess(Path(folder))
        relay.start()
        try:
            yield relay
        finally:
            relay.stop()


async def measure(options: argparse.Namespace) -> dict[str, float]:
    async with started_relay() as relay, Background() as tasks:
        empty_kib = relay.rss_kib()
        crowd = Crowd(relay.url, options.peers, options.models, random.Random(options.seed))
        began = time.monotonic()
        await asyncio.wait_for(crowd.arrive(tasks), PATIENCE_S)
        await crowd.missing({})  # behind every announcement
        print(
            f"{options.peers} peers logged in and announced in {time.monotonic() - began:.1f} s", flush=True
        )
        kib_per_peer = (relay.rss_kib() - empty_kib) / options.peers

        load = [tasks.start(work) for work in (crowd.renew(), crowd.dial(options.handshakes), crowd.insist())]
        looking = tasks.start(crowd.look(options.lookups))
        cpu_s, began = relay.cpu_s(), time.monotonic()
        await asyncio.sleep(options.seconds)
        cores = (relay.cpu_s() - cpu_s) / (time.monotonic() - began)
        lookup_ms = sorted(crowd.lookup_ms)
        _tell_load(crowd, relay, cores, kib_per_peer, options)
        looking.cancel()

        lost = await _restart(relay, crowd)
        for task in load[:2]:
            task.cancel()
        lost += await _unanswered(crowd)
        return {
            "kib_per_peer": round(kib_per_peer, 1),
            "lookup_p99_ms": round(_p99(lookup_ms), 1),
            "lost": lost,
        }


def _tell_load(
    crowd: Crowd, relay: RelayProcess, cores: float, kib_per_peer: float, options: argparse.Namespace
) -> None:
    print(f"memory: {kib_per_peer:.1f} KiB per idle peer; under load {relay.rss_kib() / 1024:.0f} MiB in all")
    print(f"relay: {cores:.2f} cores; handshakes: {len(crowd.handshake_ms) / options.seconds:.0f} per second")
    for name, values in (
        ("lookup", crowd.lookup_ms),
        ("handshake", crowd.handshake_ms),
        ("own lag", crowd.lag_ms),
    ):
        print(
            f"{name}: median {statistics.median(values):.1f} ms, p99 {_p99(values):.1f} ms of {len(values)}"
        )


async def _restart(relay: RelayProcess, crowd: Crowd) -> int:
    """End the relay under load and start it again; returns how many peers and announcements are missing."""
    before = crowd.announced()
    await asyncio.sleep(ON_ITS_WAY_S)
    began = time.monotonic()
    await asyncio.to_thread(relay.stop)
    ended_s = time.monotonic() - began
    kept = relay.kept()
    forgotten = sum(kept.get(peer, -1) < sequence for peer, sequence in before.items())
    await asyncio.to_thread(relay.start)
    print(
        f"restart: {ended_s:.1f} s to end, {time.monotonic() - began - ended_s:.1f} s to start;"
        f" {forgotten} announcements are missing in its file",
        flush=True,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            for peer in crowd.peers:
                await peer.back.wait()
    except TimeoutError:
        pass
    absent = sum(not peer.ready for peer in crowd.peers)
    print(f"all but {absent} peers are back after {time.monotonic() - began:.1f} s")
    newest = crowd.announced()
    for looker in crowd.lookers:
        await looker.back.wait()
    await asyncio.sleep(ON_ITS_WAY_S)
    return forgotten + absent + await crowd.missing(newest)


async def _unanswered(crowd: Crowd) -> int:
    """Wait for the last answers; returns how many handshakes have none."""
    deadline = time.monotonic() + 4 * OFFER_AGAIN_S
    while crowd.open and time.monotonic() < deadline:  # noqa: ASYNC110 - each answer may be the last
        await asyncio.sleep(0.1)
    print(
        f"{crowd.started} handshakes, {crowd.offered_again} offers made again over the restart,"
        f" {len(crowd.open)} never answered"
    )
    return len(crowd.open)


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)] if values else float("nan")


def _allow_many_connections(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} open files are needed and {hard} allowed: use fewer --peers")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=5000)
    parser.add_argument("--handshakes", type=float, default=500, help="per second, between any two peers")
    parser.add_argument("--lookups", type=float, default=20, help="per second")
    parser.add_argument("--models", type=int, default=50, help="that the peers serve")
    parser.add_argument("--seconds", type=float, default=20, help="of load before the restart")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _allow_many_connections(options.peers + 500)
    print(
        f"{options.peers} peers of {options.models} models, each renewing every {RENEW_EVERY_S:.0f} s;"
        f" {options.handshakes:.0f} handshakes/s, {options.lookups:.0f} lookups/s;"
        f" Python {sys.version.split()[0]}, {os.cpu_count()} cores"
    )
    print(json.dumps(asyncio.run(measure(options))))


if __name__ == "__main__":
    main()
