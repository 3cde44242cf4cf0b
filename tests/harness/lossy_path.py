"""A UDP path between two direct links that loses, repeats, delays and reorders what it is told to.

Datagrams meet their fate once the link is open (`begin`), and only DTLS application data: every test begins
with a link, and ICE keeps it.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from aiortc.sdp import candidate_from_sdp

from shared.protocol import Describe

# Takes a datagram and tells which ones go on because of it: none, itself, itself twice, an earlier one too.
Fate = Callable[[bytes], list[bytes]]

_APPLICATION_DATA = 23
# A SACK without gaps is a record of 65 bytes; the least piece of our messages is longer.
_SACK_BYTES = 80


def unharmed() -> Fate:
    return lambda datagram: [datagram]


def every_lost(distance: int, length: int = 1) -> Fate:
    """Of each `distance` datagrams the last `length` are lost."""
    count = 0

    def fate(datagram: bytes) -> list[bytes]:
        nonlocal count
        count += 1
        return [] if count % distance >= distance - length else [datagram]

    return fate


def at_random(share: float, seed: int) -> Fate:
    chance = random.Random(seed)
    return lambda datagram: [] if chance.random() < share else [datagram]


def sacks_lost(distance: int) -> Fate:
    """Only each `distance`-th acknowledgement arrives."""
    count = 0

    def fate(datagram: bytes) -> list[bytes]:
        nonlocal count
        if len(datagram) > _SACK_BYTES:
            return [datagram]
        count += 1
        return [datagram] if count % distance == 0 else []

    return fate


def tails_lost(full_bytes: int = 1200) -> Fate:
    """Each second datagram that ends a message is lost."""
    count = 0

    def fate(datagram: bytes) -> list[bytes]:
        nonlocal count
        if not _SACK_BYTES < len(datagram) < full_bytes:
            return [datagram]
        count += 1
        return [] if count % 2 else [datagram]

    return fate


def every_repeated(distance: int) -> Fate:
    """Each `distance`-th datagram arrives twice, the second time after the next one."""
    count, again = 0, list[bytes]()

    def fate(datagram: bytes) -> list[bytes]:
        nonlocal count
        count += 1
        passing = [datagram, *again]
        again.clear()
        if count % distance == 0:
            again.append(datagram)
        return passing

    return fate


def every_overtaken(distance: int, places: int) -> Fate:
    """Each `distance`-th datagram is overtaken by the `places` after it."""
    count = 0
    held: list[tuple[int, bytes]] = []

    def fate(datagram: bytes) -> list[bytes]:
        nonlocal count
        count += 1
        if count % distance == 0:
            held.append((count + places, datagram))
            return []
        passing = [datagram, *(late for due, late in held if due <= count)]
        held[:] = [(due, late) for due, late in held if due > count]
        return passing

    return fate


class LossyPath:
    """`async with LossyPath(...) as path`, then show each side what `path.between` makes of the other.

    `delay_s` and `bytes_per_s` are those of one direction, with a queue of `queue_bytes` before it. No
    datagram longer than `longest_bytes` passes, from the beginning.
    """

    def __init__(
        self,
        there: Fate | None = None,
        back: Fate | None = None,
        *,
        delay_s: float = 0.0,
        bytes_per_s: float | None = None,
        queue_bytes: int = 1 << 18,
        longest_bytes: int = 1472,
    ) -> None:
        self._doors = [_Door(), _Door()]
        for door, other, fate in zip(self._doors, reversed(self._doors), (there, back), strict=True):
            door.onward = _Line(other, fate or unharmed(), delay_s, bytes_per_s, queue_bytes)
            door.longest_bytes = longest_bytes
        self._stack = AsyncExitStack()

    def begin(self) -> None:
        """From now on datagrams meet their fate."""
        for door in self._doors:
            door.onward.fateful = True

    @property
    def harmed(self) -> int:
        """How many datagrams met another fate than to pass."""
        return sum(door.onward.harmed for door in self._doors)

    async def __aenter__(self) -> LossyPath:
        return self

    async def __aexit__(self, *_: object) -> None:
        for door in self._doors:
            door.transport.close()
            await door.closed.wait()

    async def between(self, one: Describe, other: Describe) -> tuple[Describe, Describe]:
        """What to show as `one` to the other side, and as `other` to the first: the doors of this path."""
        shown = []
        for described, door in zip((one, other), reversed(self._doors), strict=True):
            candidate = next(c for c in map(candidate_from_sdp, described.candidates) if ":" not in c.ip)
            await asyncio.get_running_loop().create_datagram_endpoint(
                lambda door=door: door,  # type: ignore[misc]
                local_addr=(candidate.ip, 0),
            )
            port = door.transport.get_extra_info("sockname")[1]
            text = f"path 1 udp 2130706431 {candidate.ip} {port} typ host"
            shown.append(msgspec.structs.replace(described, candidates=[text]))
            door.beyond = (candidate.ip, candidate.port)
        # What enters by one side's door leaves by the other's, to the address that lies beyond that one.
        one_door, other_door = self._doors
        one_door.beyond, other_door.beyond = other_door.beyond, one_door.beyond
        return shown[0], shown[1]


class _Door(asyncio.DatagramProtocol):
    """The socket that one side takes for the other."""

    transport: asyncio.DatagramTransport
    onward: _Line
    beyond: tuple[str, int]
    longest_bytes: int

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        # Where this side can be reached, which it knows better than its description.
        self.beyond = (addr[0], addr[1])
        if len(data) <= self.longest_bytes:
            self.onward.carry(data)

    def leave(self, datagram: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.sendto(datagram, self.beyond)


class _Line:
    """One direction."""

    def __init__(
        self, exit_: _Door, fate: Fate, delay_s: float, bytes_per_s: float | None, queue_bytes: int
    ) -> None:
        self.harmed = 0
        self.fateful = False
        self._exit = exit_
        self._fate = fate
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._queue_s = queue_bytes / bytes_per_s if bytes_per_s else 0.0
        self._free_at = 0.0
        self._on_way: deque[tuple[float, bytes]] = deque()

    def carry(self, datagram: bytes) -> None:
        fateful = self.fateful and datagram[0] == _APPLICATION_DATA
        onward = self._fate(datagram) if fateful else [datagram]
        self.harmed += onward != [datagram]
        for each in onward:
            self._send(each)

    def _send(self, datagram: bytes) -> None:
        loop = asyncio.get_running_loop()
        if not self._delay_s and not self._bytes_per_s:
            self._exit.leave(datagram)
            return
        now = loop.time()
        if self._bytes_per_s:
            if self._free_at - now > self._queue_s:
                self.harmed += 1
                return
            self._free_at = max(now, self._free_at) + len(datagram) / self._bytes_per_s
        self._on_way.append((max(now, self._free_at) + self._delay_s, datagram))
        if len(self._on_way) == 1:
            loop.call_at(self._on_way[0][0], self._arrive)

    def _arrive(self) -> None:
        """One timer for all on the way: timers of their own would overtake each other by their rounding."""
        loop = asyncio.get_running_loop()
        # uvloop's clock counts milliseconds.
        while self._on_way and self._on_way[0][0] <= loop.time() + 0.0005:
            self._exit.leave(self._on_way.popleft()[1])
        if self._on_way:
            loop.call_at(self._on_way[0][0], self._arrive)
