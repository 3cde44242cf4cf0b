"""The state of one running relay: who is announced, who is connected, and what has yet to be told.

Sessions change it, status pages read it, and one background task tells watchers what is new.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from msgspec import Struct

from relay.forwarding import FrameCounts
from relay.limits import LimitReached, Limits
from relay.names import own_names
from relay.participants import Participant, Participants
from relay.registry import Entry, Registry, entry_of, pages
from relay.settings import RelaySettings
from relay.tables import WriteBehind
from shared.announcement import read_announcement
from shared.errors import Refused
from shared.identity import PeerId, short
from shared.protocol import Found, SignedRecord, encode, peer_id

log = logging.getLogger(__name__)

# Changes within this time go out together: a thousand peers that renew cost watchers few messages, not many.
TELL_EVERY_S = 0.02
TIDY_EVERY_S = 10.0
WEIGH_EVERY_S = 0.5


class Counts(Struct):
    """What happened since the relay started."""

    logins: int = 0
    refused_logins: int = 0
    announcements: int = 0
    signals: int = 0
    lookups: int = 0
    denied: int = 0
    refused_connections: int = 0
    """Those that came from an address with too many, or too often."""
    refused_announcements: int = 0
    """Those that came too often."""
    slowed_s: float = 0.0
    """Time that senders were made to wait, all together."""
    idle: int = 0
    """Participants that had to go since they said nothing."""


class Meeting:
    """One relay's memory. `clock` gives seconds since 1970; tests pass their own."""

    def __init__(self, settings: RelaySettings, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.clock = clock
        self.names = own_names(settings)
        self.registry = Registry(settings.max_announcements)
        self.participants = Participants(settings)
        self.connections = 0
        """WebSockets that are open, logged in or not yet."""
        self.limits = Limits(settings)
        self.stun_ports = 0, 0
        self.writer: WriteBehind | None = None
        self.counts = Counts()
        self.frames = FrameCounts()
        # One entry per peer, so it is bounded by the registry.
        self._news: dict[str, Entry] = {}
        self._news_came = asyncio.Event()

    def restore(self, entries: Iterable[Entry]) -> None:
        """Take in what an earlier run of this relay had written down."""
        for entry in entries:
            try:
                self.registry.accept(entry)
            except Refused as error:
                log.warning("not everything in the database fits: %s", error)
                return

    def announce(self, participant: Participant, record: SignedRecord) -> None:
        """Take in what a participant says of itself. Raises ProtocolError or Refused."""
        try:
            self.limits.announce(participant.peer, participant.address)
        except LimitReached:
            self.counts.refused_announcements += 1
            raise
        now = self.clock()
        announcement = read_announcement(record, now)
        if announcement.peer != participant.peer:
            raise Refused(
                f"{short(participant.peer)} may announce only for itself, not for"
                f" {short(peer_id(announcement.peer))}"
            )
        entry = entry_of(record, announcement, now)
        if not self.registry.accept(entry):
            return
        self.counts.announcements += 1
        if self.writer is not None:
            self.writer.put(entry)
        self._tell_soon(entry)

    def enter(self, participant: Participant) -> Participant | None:
        """A participant has logged in; returns the older connection of the same one, which it replaces."""
        older = self.participants.get(participant.peer)
        self.participants.add(participant)
        if participant.peer in self.registry.departed:
            self.registry.departed.discard(participant.peer)
            entry = self.registry.get(participant.peer)
            if entry is not None and entry.live(self.clock()):
                # Watchers were told that it had gone.
                self._tell_soon(entry)
        return older

    def leave(self, participant: Participant) -> None:
        """A connection has ended: everyone concerned hears of it before anything else happens."""
        current = self.participants.remove(participant)
        entry = self.registry.get(participant.peer)
        announced = self._announced(participant.peer)
        if announced and current:
            self.registry.departed.add(participant.peer)
        model = entry.announcement.model if entry is not None and announced else None
        self.participants.tell_gone(participant, model)
        if entry is not None and announced and not current:
            # A newer connection of the same participant is here: it is gone for an instant only.
            self._tell_soon(entry)

    # ------------------------------------------------------------ in the background

    async def tell_news(self) -> None:
        """Tell watchers what changed, until cancelled."""
        while True:
            await self._news_came.wait()
            await asyncio.sleep(TELL_EVERY_S)
            self._news_came.clear()
            news, self._news = self._news, {}
            # Of those that left meanwhile, watchers have heard already; they must not seem to be back.
            here = [entry for entry in news.values() if entry.peer not in self.registry.departed]
            self._tell(None, here)
            by_model: dict[str, list[Entry]] = {}
            for entry in here:
                by_model.setdefault(entry.announcement.model, []).append(entry)
            for model, entries in by_model.items():
                self._tell(model, entries)

    async def tidy(self) -> None:
        """Forget what has run out, until cancelled."""
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            now = self.clock()
            if self.registry.forget(now) and self.writer is not None:
                await self.writer.forget(now)
            self._dismiss_idle()

    async def weigh(self) -> None:
        """Keep what waits for slow readers within memory, until cancelled."""
        while True:
            await asyncio.sleep(WEIGH_EVERY_S)
            self.participants.weigh()

    def _dismiss_idle(self) -> None:
        idle_s = self.settings.idle_s
        if not idle_s:
            return
        for participant in self.participants.silent_since(time.monotonic() - idle_s):
            if not participant.watches and not self._announced(participant.peer):
                self.counts.idle += 1
                participant.dismiss(f"nothing was said for {idle_s:.0f} s: connect again when needed")

    def _announced(self, peer: PeerId) -> bool:
        entry = self.registry.get(peer)
        return entry is not None and entry.live(self.clock())

    def _tell(self, model: str | None, entries: Iterable[Entry]) -> None:
        watchers = [
            watcher
            for watcher in self.participants.watchers(model)
            # Whoever watches all heard it already.
            if model is None or None not in watcher.watches
        ]
        if not watchers:
            return
        for page in pages(entry.record for entry in entries):
            message = encode(Found(request=0, records=page))
            for watcher in watchers:
                watcher.send_encoded(message)

    def _tell_soon(self, entry: Entry) -> None:
        self._news[entry.peer] = entry
        self._news_came.set()
