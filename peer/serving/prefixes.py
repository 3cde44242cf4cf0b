"""What finished sessions leave behind, and running ones lend, for sessions that begin with the same tokens.

A kept prefix is the session's own KV cache and input log, in memory that no session has reserved: whoever
reserves goes first, and the prefix used least recently is freed. Only the same asker, by the same peers up to
here, gets it back. So nobody can slip another asker a cache under a false name, and what a hop computed wrong
reaches no route without that hop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from peer.model.kv_cache import KVCache
from peer.serving.input_log import InputLog
from shared.protocol import PREFIX_PAGE


@dataclass(frozen=True, eq=False)
class Prefix:
    """The cache and the log of a session, with the names of its pages."""

    scope: Hashable
    pages: Sequence[str]
    length: int
    """Positions that both the cache and, where there is a next hop, the log hold."""
    cache: KVCache
    log: InputLog
    unchanged: Callable[[], int] | None = None
    """Of a session that still runs: up to where its cache is what it was when this was made."""

    @property
    def held_bytes(self) -> int:
        return self.cache.bytes + self.log.held_bytes

    def common(self, pages: Sequence[str]) -> int:
        """How many whole pages it shares with a text of these pages."""
        count = 0
        for mine, theirs in zip(self.pages, pages, strict=False):
            if mine != theirs:
                break
            count += 1
        return count

    def shared(self, pages: Sequence[str]) -> int:
        """How many positions of such a text it holds."""
        return min(self.common(pages) * PREFIX_PAGE, self.length)


@dataclass(frozen=True)
class Beginning:
    """The first pages of a prefix, for a session that begins like it.

    `owned` when the prefix is this session's alone now; else the session takes a copy, and the prefix stays.
    """

    prefix: Prefix
    pages: int
    owned: bool

    def take(self, capacity: int) -> tuple[KVCache, InputLog]:
        """The cache and the log to begin with. In the executor: a pass of the old session may still run."""
        cache, log = self.prefix.cache, self.prefix.log
        # That pass may have begun further back.
        length = min(self.pages * PREFIX_PAGE, self.prefix.length, cache.length)
        if self.prefix.unchanged is not None:
            length = min(length, self.prefix.unchanged())
        if not self.owned:
            return cache.copy(length, capacity), log.copy(length)
        cache.truncate(length)
        cache.resize(capacity)
        log.truncate(length)
        return cache, log


class Prefixes:
    """Kept prefixes, the least recently used first."""

    def __init__(self) -> None:
        self._kept: list[Prefix] = []

    @property
    def held_bytes(self) -> int:
        """Memory that all of them hold."""
        return sum(prefix.held_bytes for prefix in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, prefix: Prefix, free_bytes: int) -> None:
        """Keep a prefix with at least one page, if it fits into what sessions leave free."""
        pages = prefix.pages[: prefix.length // PREFIX_PAGE]
        if not pages or prefix.held_bytes > free_bytes:
            return
        # One that says the same or less is of no more use.
        self._kept = [
            old for old in self._kept if old.scope != prefix.scope or old.common(pages) < len(old.pages)
        ]
        self._kept.append(replace(prefix, pages=pages))
        self.shrink(free_bytes)

    def begin(
        self, scope: Hashable, pages: Sequence[str], free_bytes: int, lent: Sequence[Prefix] = ()
    ) -> Beginning | None:
        """The prefix that shares most with a text, of those kept and those `lent`; None without any.

        A session that goes on where it ends takes it over; so does one for which there is no room for a copy
        in the `free_bytes` that reservations leave.
        """
        found = max(
            (prefix for prefix in (*self._kept, *lent) if prefix.scope == scope),
            key=lambda prefix: prefix.shared(pages),
            default=None,
        )
        if found is None or found.shared(pages) == 0:
            self.shrink(free_bytes)
            return None
        common, lends = found.common(pages), found.unchanged is not None
        if not lends:
            self._kept.remove(found)
            if common < len(found.pages):
                self._kept.append(found)
        self.shrink(free_bytes)
        return Beginning(found, common, owned=not lends and found not in self._kept)

    def shrink(self, free_bytes: int) -> None:
        """Free prefixes until the rest fits."""
        while self._kept and self.held_bytes > free_bytes:
            self._kept.pop(0)
