"""What an operator can set on a relay. The command line fills it in, tests build it."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct


class RelaySettings(Struct, frozen=True, kw_only=True):
    """Everything a relay is told before it starts. Limits are per connection unless they say otherwise."""

    host: str = "127.0.0.1"
    port: int = 8787
    """TCP port of the WebSocket and the status pages; 0 takes a free one."""
    names: tuple[str, ...] = ()
    """Host names that this relay goes by, for logins and against DNS rebinding. See relay/names.py."""
    origins: tuple[str, ...] = ()
    """Web origins, other than its own, whose pages may open a WebSocket here."""
    stun: bool = True
    stun_port: int | None = None
    """UDP port of the STUN responder; None takes the number of `port`."""
    database: Path | None = None
    """Where announcements outlive a restart; None keeps them in memory only."""

    max_participants: int = 10_000
    max_announcements: int = 50_000
    """Of all participants together, withdrawn and recently expired ones included."""
    login_deadline_s: float = 10.0
    # A pong may take half of this. Lenient, since a relay that is starved for a moment would otherwise
    # drop thousands of connections at once; a killed process is noticed by its closed socket anyway.
    heartbeat_s: float = 40.0

    control_per_s: float = 20.0
    control_burst: float = 200.0
    announcements_per_s: float = 1.0
    announcements_burst: float = 20.0
    max_watches: int = 16

    # What waits for one slow reader. A channel may have 512 KiB on its way here, and one peer has channels to
    # many; beyond this, frames to it are dropped and their senders told, so nobody else ever waits.
    frame_backlog_bytes: int = 4 * 1024 * 1024
    # Control messages are never dropped one by one: a reader this far behind is disconnected instead.
    control_backlog_bytes: int = 8 * 1024 * 1024
