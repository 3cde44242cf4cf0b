"""What the relay knows of its peers: the newest announcement of each. Pure: all times are passed in.

Expiry is a filter for readers, never part of the choice between two records. An expired or withdrawn
announcement is kept for a while as a tombstone, so that an older one that is still valid cannot return.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from shared.announcement import CLOCK_SKEW_S, MAX_LEASE_S, newer
from shared.errors import Refused, StaleRecord
from shared.identity import PeerId, short
from shared.protocol import Announcement, SignedRecord, peer_id

# Whatever was signed before the record we hold has run out by then, however its peer's clock differs.
TOMBSTONE_S = MAX_LEASE_S + CLOCK_SKEW_S

# Well below the longest relay message, with room for the rest of the JSON and for one longest record.
PAGE_BYTES = 48 * 1024


class Entry(Struct, frozen=True, gc=False):
    """The newest announcement of a peer, and until when it must not be forgotten."""

    announcement: Announcement
    record: SignedRecord
    keep_until: float

    @property
    def peer(self) -> PeerId:
        return peer_id(self.announcement.peer)

    def live(self, now: float) -> bool:
        return self.announcement.state != "left" and self.announcement.expires_at > now


def entry_of(record: SignedRecord, announcement: Announcement, now: float) -> Entry:
    return Entry(announcement, record, now + TOMBSTONE_S)


class Registry:
    """The newest announcement per peer. `capacity` bounds it: beyond, new peers are refused."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: dict[PeerId, Entry] = {}
        # The same again, since most lookups are for one model of many.
        self._by_model: dict[str, dict[PeerId, Entry]] = {}
        self.departed: set[PeerId] = set()
        """Peers whose connection here ended while they were announced. Those only known from before a
        restart are not among them: they are most likely on their way back."""

    def __len__(self) -> int:
        return len(self._entries)

    def accept(self, entry: Entry) -> bool:
        """Take in a valid record; False when it is the one we hold already.

        Raises StaleRecord for an older one, Refused when there is no room for another peer.
        """
        held = self._entries.get(entry.peer)
        if held is None:
            if len(self._entries) >= self._capacity:
                raise Refused(f"this relay already keeps {self._capacity} announcements: try another relay")
        elif held.record == entry.record:
            return False
        elif newer(held.record, entry.record) is held.record:
            raise StaleRecord(
                f"announcement {entry.announcement.sequence} of {short(entry.peer)} is not newer than"
                f" {held.announcement.sequence}, which this relay holds"
            )
        else:
            self._drop(entry.peer)
        self._entries[entry.peer] = entry
        self._by_model.setdefault(entry.announcement.model, {})[entry.peer] = entry
        return True

    def get(self, peer: PeerId) -> Entry | None:
        return self._entries.get(peer)

    def live(self, now: float, model: str | None = None) -> list[Entry]:
        """Announcements that are neither expired nor withdrawn, of one model or of all."""
        entries = self._entries if model is None else self._by_model.get(model, {})
        return [entry for entry in entries.values() if entry.live(now)]

    def forget(self, now: float) -> list[PeerId]:
        """Drop the tombstones that have served their time; returns whose."""
        over = [peer for peer, entry in self._entries.items() if entry.keep_until <= now]
        for peer in over:
            self._drop(peer)
            self.departed.discard(peer)
        return over

    def _drop(self, peer: PeerId) -> None:
        model = self._entries.pop(peer).announcement.model
        del self._by_model[model][peer]
        if not self._by_model[model]:
            del self._by_model[model]


def pages(records: Iterable[SignedRecord]) -> Iterator[list[SignedRecord]]:
    """Records in lists that each fit in one relay message; at least one list, if only an empty one."""
    page: list[SignedRecord] = []
    size = 0
    for record in records:
        # Quotes inside the body are escaped on the wire, and letters may take four bytes.
        length = 2 * len(record.body.encode()) + 200
        if page and size + length > PAGE_BYTES:
            yield page
            page, size = [], 0
        page.append(record)
        size += length
    yield page
