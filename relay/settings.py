"""What an operator can set on a relay. The command line fills it in, tests build it."""

from __future__ import annotations

import math
from pathlib import Path

from msgspec import Struct


class Rate(Struct, frozen=True):
    """So many per second in the long run, and `burst` at once after a pause."""

    per_s: float
    burst: float


UNLIMITED = Rate(math.inf, math.inf)


class RelaySettings(Struct, frozen=True, kw_only=True):
    """Everything a relay is told before it starts. Limits are per connection unless they say otherwise.

    The limits suit the smallest machine that one can rent (one core, 1 GB, 100 Mbit/s or more): no
    participant and no address can take more than a part of it, however it behaves.
    """

    host: str = "127.0.0.1"
    port: int = 8787
    """TCP port of the WebSocket and the status pages; 0 takes a free one."""
    names: tuple[str, ...] = ()
    """Host names that this relay goes by, for logins and against DNS rebinding. See relay/names.py."""
    origins: tuple[str, ...] = ()
    """Web origins, other than its own, whose pages may open a WebSocket here."""
    proxies: tuple[str, ...] = ("127.0.0.1", "::1")
    """Addresses of reverse proxies, whose X-Forwarded-For is believed. Those on this machine always are:
    whoever can connect from here can hide behind them anyway."""
    stun: bool = True
    stun_port: int | None = None
    """UDP port of the STUN responder; None takes the number of `port`."""
    second_stun_port: int | None = None
    """Another one, by which symmetric NATs show; None takes the next number."""
    database: Path | None = None
    """Where announcements outlive a restart; None keeps them in memory only."""

    max_participants: int = 10_000
    max_announcements: int = 50_000
    """Of all participants together, withdrawn and recently expired ones included."""
    login_deadline_s: float = 10.0
    # A pong may take half of this. Lenient, since a relay that is starved for a moment would otherwise
    # drop thousands of connections at once; a killed process is noticed by its closed socket anyway.
    heartbeat_s: float = 40.0
    idle_s: float = 600.0
    """Who says nothing for so long, announces nothing and watches nothing has to go. 0 lets it stay."""

    # A household, an office or a mobile carrier's router may be one address: room for all their machines.
    address_connections: int = 200
    """Connections that one address may hold open."""
    address_new_connections: Rate = Rate(10, 200)
    """A login costs some 0.7 ms of a core."""

    participant_bytes: Rate = Rate(8e6, 32e6)
    """Frames to be forwarded, and answers to lookups. Each token of a large model, in prompt and answer,
    takes 16 to 64 KiB for each hop that has no direct path."""
    address_bytes: Rate = Rate(16e6, 64e6)

    participant_control: Rate = Rate(20, 200)
    """Messages other than frames."""
    participant_announcements: Rate = Rate(1, 20)
    """A peer renews every 15 s; checking one costs some 0.3 ms of a core."""
    address_announcements: Rate = Rate(20, 400)
    max_watches: int = 16

    # What waits for one slow reader. A channel may have 512 KiB on its way here, and one peer has channels to
    # many; beyond this, frames to it are dropped and their senders told, so nobody else ever waits.
    frame_backlog_bytes: int = 4 * 1024 * 1024
    # What waits for all slow readers together; beyond, each of them gets a smaller part.
    total_backlog_bytes: int = 128 * 1024 * 1024
    # Control messages are never dropped one by one: a reader this far behind is disconnected instead.
    control_backlog_bytes: int = 8 * 1024 * 1024
