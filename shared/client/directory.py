"""What the relays show, as one map: the newest valid announcement of every live peer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from shared.announcement import CLOCK_SKEW_S, MAX_LEASE_S, newer, read_announcement
from shared.errors import NoRoute, ProtocolError
from shared.identity import PeerId
from shared.protocol import Announcement, HostedAdapter, SignedRecord
from shared.spans import Span, coverage, gaps

log = logging.getLogger(__name__)

ROOM = 20_000
"""Peers that one relay may bring: a relay that invents more does not fill our memory."""
SWEEP_S = 10.0
TOMBSTONE_S = MAX_LEASE_S + CLOCK_SKEW_S
"""Kept so long after it expired, so that an older record that is still valid cannot return."""

Listener = Callable[[], None]


class Directory:
    """Merges signed announcements from any number of relays; a relay can withhold, but neither forge nor age.

    Where relays disagree whether a peer is connected, the one that shows it is right: the other may have lost
    it, or hide it. `clock` gives seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._records: dict[PeerId, SignedRecord] = {}
        self._announcements: dict[PeerId, Announcement] = {}
        self._peer_of: dict[SignedRecord, PeerId] = {}
        self._words: dict[PeerId, dict[str, bool]] = {}
        """The last word of each relay on a peer: here or gone."""
        self._brought: dict[PeerId, str] = {}
        """Which relay was the first to show a peer; its room is that relay's."""
        self._room: dict[str, int] = {}
        self._swept_at = 0.0
        self._listeners: list[Listener] = []

    def add(self, record: SignedRecord, relay: str = "") -> None:
        """Take in a record that a relay shows; anything invalid, expired or older than ours is dropped."""
        known = self._peer_of.get(record)
        if known is not None:
            # The same again, by another relay or since the peer is back: its signature is checked already.
            self._say(known, relay, True)
            return
        try:
            announcement = read_announcement(record, self._clock())
        except ProtocolError as error:
            log.debug("announcement dropped: %s", error)
            return
        peer = PeerId(announcement.peer)
        held = self._records.get(peer)
        if held is None:
            if not self._find_room(relay):
                log.warning("the relay at %s shows more than %d peers: the rest is dropped", relay, ROOM)
                return
            self._brought[peer] = relay
            self._room[relay] = self._room.get(relay, 0) + 1
        elif newer(held, record) is held:
            return
        else:
            del self._peer_of[held]
        self._records[peer] = record
        self._announcements[peer] = announcement
        self._peer_of[record] = peer
        self._words.setdefault(peer, {})[relay] = True
        self._changed()

    def gone(self, peer: PeerId, relay: str = "") -> None:
        """A relay says that a peer is not connected to it: not routed to unless another relay shows it."""
        if peer in self._announcements:
            self._say(peer, relay, False)

    def lost(self, relay: str) -> None:
        """Our connection to a relay ended: what it showed counts no more, should another disagree."""
        before = self._away_peers()
        for words in self._words.values():
            if words.get(relay):
                del words[relay]
        if self._away_peers() != before:
            self._changed()

    def live(self) -> list[Announcement]:
        """Announcements that are neither expired nor withdrawn, of peers that are connected."""
        return [announcement for peer, announcement in self._announcements.items() if self.is_live(peer)]

    def is_live(self, peer: PeerId) -> bool:
        """Whether a peer is in the swarm, as far as it and the relays say."""
        announcement = self._announcements.get(peer)
        if announcement is None or announcement.expires_at <= self._clock():
            return False
        return announcement.state != "left" and not self._away(peer)

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

    def adapted(self) -> list[ServedModel]:
        """Every artefact with every adapter that a live peer hosts for it, named `model+adapter`."""
        hosts: dict[tuple[str, HostedAdapter], list[Announcement]] = {}
        for peer in self.live():
            for adapter in peer.adapters:
                hosts.setdefault((peer.artefact, adapter), []).append(peer)
        models = [ServedModel(peers, adapter) for (_, adapter), peers in hosts.items()]
        return sorted(models, key=lambda model: (not model.covered, model.name, -len(model.peers)))

    def find(self, name: str) -> ServedModel:
        """The best covered artefact with this model name (or artefact id). Raises NoRoute."""
        models = self.models()
        adapted = self.adapted() if "+" in name else []
        for model in [*models, *adapted]:
            if name == model.name or (name == model.artefact and not model.adapter):
                return model
        raise NoRoute(f"no live peer serves any layer of {name}")

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` after every change; returns a function that stops it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _say(self, peer: PeerId, relay: str, here: bool) -> None:
        before = self._away(peer)
        self._words[peer][relay] = here
        if self._away(peer) != before:
            self._changed()

    def _away(self, peer: PeerId) -> bool:
        """Some relay says that it is gone, and none that it is here."""
        words = self._words[peer].values()
        return bool(words) and not any(words)

    def _away_peers(self) -> set[PeerId]:
        return {peer for peer in self._words if self._away(peer)}

    def _find_room(self, relay: str) -> bool:
        """Whether a relay may bring one more peer. Each has its own room, so none can crowd out another's."""
        now = self._clock()
        if self._room.get(relay, 0) >= ROOM and now - self._swept_at > SWEEP_S:
            self._swept_at = now
            for peer, announcement in list(self._announcements.items()):
                if announcement.expires_at + TOMBSTONE_S <= now:
                    self._forget(peer)
        return self._room.get(relay, 0) < ROOM

    def _forget(self, peer: PeerId) -> None:
        del self._peer_of[self._records.pop(peer)]
        del self._announcements[peer], self._words[peer]
        self._room[self._brought.pop(peer)] -= 1

    def _changed(self) -> None:
        for listener in list(self._listeners):
            listener()


class ServedModel:
    """One artefact and the live peers that announce layers of it."""

    def __init__(self, peers: Sequence[Announcement], adapter: HostedAdapter | None = None) -> None:
        first = peers[0]
        self.peers = sorted(peers, key=lambda peer: (peer.start, peer.end, peer.name))
        self.name = f"{first.model}+{adapter.name}" if adapter else first.model
        self.adapter = adapter.id if adapter else ""
        """The id of the adapter with which these peers serve it; empty for the model as it is."""
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
