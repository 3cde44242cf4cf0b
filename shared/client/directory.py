"""What the relays show, as one map: the newest valid announcement of every live peer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from shared.announcement import newer, read_announcement
from shared.errors import NoRoute, ProtocolError
from shared.identity import PeerId
from shared.protocol import Announcement, SignedRecord
from shared.spans import Span, coverage, gaps

log = logging.getLogger(__name__)

Listener = Callable[[], None]


class Directory:
    """Merges signed announcements from any number of relays; a relay can withhold, but neither forge nor age.

    `clock` gives seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._records: dict[PeerId, SignedRecord] = {}
        self._announcements: dict[PeerId, Announcement] = {}
        self._away: set[PeerId] = set()
        self._listeners: list[Listener] = []

    def add(self, record: SignedRecord) -> None:
        """Take in a record; anything invalid, expired or older than what we hold is dropped."""
        try:
            announcement = read_announcement(record, self._clock())
        except ProtocolError as error:
            log.debug("announcement dropped: %s", error)
            return
        peer = PeerId(announcement.peer)
        held = self._records.get(peer)
        if held is not None and newer(held, record) is held:
            return
        self._records[peer] = record
        self._announcements[peer] = announcement
        self._away.discard(peer)
        self._changed()

    def gone(self, peer: PeerId) -> None:
        """A relay says that a peer is not connected: not routed to until it announces itself again."""
        if peer in self._announcements and peer not in self._away:
            self._away.add(peer)
            self._changed()

    def live(self) -> list[Announcement]:
        """Announcements that are neither expired nor withdrawn, of peers that are connected."""
        now = self._clock()
        return [
            announcement
            for peer, announcement in self._announcements.items()
            if announcement.expires_at > now and announcement.state != "left" and peer not in self._away
        ]

    def get(self, peer: PeerId) -> Announcement | None:
        """The last announcement of a peer, live or not."""
        return self._announcements.get(peer)

    def name(self, peer: PeerId) -> str:
        """What a peer calls itself, or the start of its id."""
        announcement = self._announcements.get(peer)
        return announcement.name if announcement and announcement.name else peer[:8]

    def serving(self, artefact: str) -> list[Announcement]:
        """Live peers that take new sessions for an artefact."""
        return [peer for peer in self.live() if peer.artefact == artefact and peer.state == "serving"]

    def models(self) -> list[ServedModel]:
        """Every artefact that a live peer serves, best covered first."""
        by_artefact: dict[str, list[Announcement]] = {}
        for announcement in self.live():
            by_artefact.setdefault(announcement.artefact, []).append(announcement)
        models = [ServedModel(announcements) for announcements in by_artefact.values()]
        return sorted(models, key=lambda model: (not model.covered, model.name, -len(model.peers)))

    def find(self, name: str) -> ServedModel:
        """The best covered artefact with this model name (or artefact id). Raises NoRoute."""
        for model in self.models():
            if name in (model.name, model.artefact):
                return model
        raise NoRoute(f"no live peer serves any layer of {name}")

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` after every change; returns a function that stops it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _changed(self) -> None:
        for listener in list(self._listeners):
            listener()


class ServedModel:
    """One artefact and the live peers that announce layers of it."""

    def __init__(self, peers: Sequence[Announcement]) -> None:
        first = peers[0]
        self.peers = sorted(peers, key=lambda peer: (peer.start, peer.end, peer.name))
        self.name = first.model
        self.artefact = first.artefact
        self.layer_count = first.layer_count
        self.context_length = min(peer.context_length for peer in peers)

    @property
    def serving(self) -> list[Announcement]:
        return [peer for peer in self.peers if peer.state == "serving"]

    @property
    def coverage(self) -> list[int]:
        """How many serving peers hold each layer."""
        return coverage((Span(peer.start, peer.end) for peer in self.serving), self.layer_count)

    @property
    def gaps(self) -> list[Span]:
        return gaps(self.coverage)

    @property
    def covered(self) -> bool:
        return not self.gaps
