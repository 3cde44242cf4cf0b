"""How much one participant, or one address, may ask of the relay. Pure: the clock is passed in.

Who asks for too much is either slowed or refused. Bytes and questions are slowed: the relay reads no further
on that connection until they are due, and TCP makes the sender wait. Connections and announcements are
refused with a sentence that says when to come back. Nobody else waits, and nothing is dropped in silence.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable

from relay.settings import Rate, RelaySettings
from shared.errors import Refused

MAX_KEYS = 100_000
"""Buckets kept at most; each takes some 200 bytes. Beyond, those that asked longest ago begin anew."""
_FIRST_SWEEP = 1024
FULL_RETRY_S = 30.0
"""When to ask again for a place that frees itself only when somebody leaves."""


class LimitReached(Refused):
    """Too much was asked; the same may be asked again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(f"{message}; come back in {math.ceil(retry_after_s)} s")
        self.retry_after_s = retry_after_s


class Bucket:
    """A token bucket, full at first."""

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._tokens = rate.burst
        self._filled_at = now

    def take(self, now: float, amount: float = 1.0) -> float:
        """Take tokens, even those still to come; returns how many seconds to wait until they are there."""
        if self._rate.per_s == math.inf:
            return 0.0
        self._fill(now)
        self._tokens -= amount
        return max(0.0, -self._tokens / self._rate.per_s)

    def take_if_there(self, now: float) -> float:
        """Take one token and return 0, or take nothing and return how many seconds one is away."""
        if self._rate.per_s == math.inf:
            return 0.0
        self._fill(now)
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate.per_s
        self._tokens -= 1
        return 0.0

    def full(self, now: float) -> bool:
        """Whether it is as good as a new one."""
        self._fill(now)
        return self._tokens >= self._rate.burst

    def _fill(self, now: float) -> None:
        # A clock that is set back adds nothing and takes nothing.
        passed_s = max(0.0, now - self._filled_at)
        self._filled_at = now
        self._tokens = min(self._rate.burst, self._tokens + passed_s * self._rate.per_s)


class Buckets:
    """A bucket for each participant, or each address, that asked for something lately.

    Bounded: full buckets are forgotten, and beyond MAX_KEYS the oldest quarter, which then begin anew.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self._sweep_at = _FIRST_SWEEP

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, amount: float = 1.0) -> float:
        return self._bucket(key).take(self._clock(), amount)

    def take_if_there(self, key: str) -> float:
        return self._bucket(key).take_if_there(self._clock())

    def _bucket(self, key: str) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._sweep_at:
                self._sweep()
            bucket = self._buckets[key] = Bucket(self._rate, self._clock())
        return bucket

    def _sweep(self) -> None:
        now = self._clock()
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if not bucket.full(now)}
        if len(self._buckets) >= MAX_KEYS:
            for key in list(self._buckets)[: MAX_KEYS // 4]:
                del self._buckets[key]
        # Twice what is left, so that sweeping costs each newcomer the same however many there are.
        self._sweep_at = min(MAX_KEYS, max(_FIRST_SWEEP, 2 * len(self._buckets)))


class OpenConnections:
    """How many connections each address holds open, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[str, int] = {}

    def __getitem__(self, address: str) -> int:
        return self._open.get(address, 0)

    def open(self, address: str) -> bool:
        """Count one more; False when there are as many as there may be."""
        if self[address] >= self._limit:
            return False
        self._open[address] = self[address] + 1
        return True

    def close(self, address: str) -> None:
        left = self._open[address] - 1
        if left:
            self._open[address] = left
        else:
            del self._open[address]


class Limits:
    """What participants and addresses used lately, measured on a clock that nobody sets."""

    def __init__(self, settings: RelaySettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self.open = OpenConnections(settings.address_connections)
        self.connections = Buckets(settings.address_new_connections, clock)
        self.bytes = Buckets(settings.participant_bytes, clock)
        self.address_bytes = Buckets(settings.address_bytes, clock)
        self.control = Buckets(settings.participant_control, clock)
        self.announcements = Buckets(settings.participant_announcements, clock)
        self.address_announcements = Buckets(settings.address_announcements, clock)

    def connect(self, address: str) -> None:
        """Count a new connection of an address; `self.open.close` ends it. Raises LimitReached."""
        wait_s = self.connections.take_if_there(address)
        if wait_s > 0:
            raise LimitReached("this address opens connections too often", wait_s)
        if not self.open.open(address):
            raise LimitReached(
                f"this address holds {self._settings.address_connections} connections already", FULL_RETRY_S
            )

    def take_bytes(self, peer: str, address: str, count: int) -> float:
        """How long to wait before reading on."""
        return max(self.bytes.take(peer, count), self.address_bytes.take(address, count))

    def announce(self, peer: str, address: str) -> None:
        """Raises LimitReached when a participant, or all of an address, announce too often."""
        wait_s = self.announcements.take_if_there(peer)
        if wait_s > 0:
            raise LimitReached("this participant announces itself too often", wait_s)
        wait_s = self.address_announcements.take_if_there(address)
        if wait_s > 0:
            raise LimitReached("the participants of this address announce themselves too often", wait_s)


def address_key(address: str) -> str:
    """Whom an address counts for: IPv4 by itself, IPv6 by its /64, which is what one household is given."""
    ip = _plain(address)
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))
    return str(ip)


def seen_address(remote: str, forwarded_for: str | None, proxies: tuple[str, ...]) -> str:
    """Where a connection comes from: what a proxy of ours says, else the other end of the connection.

    A proxy appends what it saw, so only its last word counts: the rest may be anybody's invention.
    """
    if forwarded_for is None or _plain(remote) not in {_plain(proxy) for proxy in proxies}:
        return remote
    return forwarded_for.rpartition(",")[2].strip() or remote


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | str:
    """Without a zone, and an IPv4 address that came as IPv6 as what it is."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return getattr(ip, "ipv4_mapped", None) or ip
