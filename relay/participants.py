"""Who is connected to the relay right now, and how to send each of them something without ever waiting."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

import aiohttp
from aiohttp import web

from relay.settings import RelaySettings
from shared.identity import PeerId, id_bytes, short
from shared.protocol import Denied, FromRelay, Gone, encode
from shared.short_way import BINARY, TEXT, server_frame

log = logging.getLogger(__name__)

# Beyond this many, the oldest acquaintance is not told when a participant goes; its own beats will notice.
MAX_CONTACTS = 4096
# How long the last words to a participant may take before its connection is cut.
LAST_WORDS_S = 5.0
# aiohttp waits for a slow reader only after this many bytes: never. The relay bounds the backlog itself.
NEVER_WAIT = 1 << 62
# Readers with less than this waiting are not slow: it is one round trip of a home line.
LEAST_BACKLOG_BYTES = 256 * 1024


class Backlog:
    """How much may wait for one slow reader. The more of them there are, the less for each."""

    def __init__(self, settings: RelaySettings) -> None:
        self.control_bytes = settings.control_backlog_bytes
        self.frame_bytes = settings.frame_backlog_bytes
        self._most = settings.frame_backlog_bytes
        self._total = settings.total_backlog_bytes

    def weigh(self, waiting: Iterable[int]) -> None:
        """Divide the room anew, given what waits for each reader now."""
        slow = sum(1 for size in waiting if size > LEAST_BACKLOG_BYTES)
        share = self._total // slow if slow else self._most
        self.frame_bytes = max(min(LEAST_BACKLOG_BYTES, self._most), min(self._most, share))


class Participant:
    """One logged-in connection.

    Its outgoing queue is the transport's own buffer, bounded by `backlog.frame_bytes` for frames (dropped
    beyond it) and `control_backlog_bytes` for all else (disconnected beyond it). Sending never waits.
    """

    # Ten thousand of these are meant to fit on a small machine.
    __slots__ = (
        "_backlog",
        "_socket",
        "_transport",
        "address",
        "contacts",
        "heard_at",
        "peer",
        "raw_id",
        "watches",
    )

    def __init__(
        self,
        peer: PeerId,
        socket: web.WebSocketResponse,
        transport: asyncio.Transport,
        address: str,
        backlog: Backlog,
    ) -> None:
        self.peer = peer
        self.address = address
        """Whom its limits count for besides itself; told to nobody."""
        self.heard_at = time.monotonic()
        self.raw_id = id_bytes(peer)
        self.watches: set[str | None] = set()
        # Ordered, so that the oldest can be dropped; bounded by MAX_CONTACTS.
        self.contacts: dict[PeerId, None] = {}
        self._socket = socket
        self._transport = transport
        self._backlog = backlog

    @property
    def waiting_bytes(self) -> int:
        """What it has not read yet, beyond what the system holds for it."""
        return self._transport.get_write_buffer_size()

    def send(self, message: FromRelay) -> None:
        self.send_encoded(encode(message))

    def send_encoded(self, message: bytes) -> None:
        """Send a control message. A participant that never reads is cut off rather than waited for."""
        if self.waiting_bytes > self._backlog.control_bytes:
            log.info("%s does not read what it asked for: disconnected", short(self.peer))
            self._transport.abort()
            return
        self._write(server_frame(TEXT, message))

    def send_frame(self, source: bytes, payload: memoryview) -> bool:
        """Send a frame; False when too much waits already and the frame was dropped."""
        if self.waiting_bytes + len(payload) > self._backlog.frame_bytes:
            return False
        self._write(server_frame(BINARY, source, payload))
        return True

    def dismiss(self, reason: str) -> None:
        """Tell why, and end the connection soon, whether or not the other side still reads."""
        self.send(Denied(reason, fatal=True))
        self._transport.close()
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._transport.abort)

    async def close(self) -> None:
        """End the connection in good order, waiting a moment for the other side."""
        await self._socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)

    def _write(self, message: bytes) -> None:
        # Past aiohttp, which writes whole messages too. When it is going, its own session tells everyone.
        if not self._socket.closed and not self._transport.is_closing():
            self._transport.write(message)


class Participants:
    """All logged-in connections, one per id, and who watches what."""

    def __init__(self, settings: RelaySettings) -> None:
        self.backlog = Backlog(settings)
        self._by_id: dict[PeerId, Participant] = {}
        self._by_raw_id: dict[bytes, Participant] = {}
        self._watchers: dict[str | None, set[Participant]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._by_id

    def all(self) -> list[Participant]:
        return list(self._by_id.values())

    def get(self, peer: PeerId) -> Participant | None:
        return self._by_id.get(peer)

    def at(self, raw_id: bytes) -> Participant | None:
        """By the 32 bytes that a frame starts with."""
        return self._by_raw_id.get(raw_id)

    def add(self, participant: Participant) -> None:
        self._by_id[participant.peer] = participant
        self._by_raw_id[participant.raw_id] = participant

    def remove(self, participant: Participant) -> bool:
        """Forget a connection; False when a newer login has taken its place already."""
        for model in participant.watches:
            watchers = self._watchers[model]
            watchers.discard(participant)
            if not watchers:
                del self._watchers[model]
        participant.watches.clear()
        if self._by_id.get(participant.peer) is not participant:
            return False
        del self._by_id[participant.peer]
        del self._by_raw_id[participant.raw_id]
        return True

    def watch(self, participant: Participant, model: str | None) -> None:
        participant.watches.add(model)
        self._watchers.setdefault(model, set()).add(participant)

    def watchers(self, model: str | None) -> Iterable[Participant]:
        """Who watches exactly this model; None for those who watch all."""
        return tuple(self._watchers.get(model, ()))

    def silent_since(self, moment: float) -> list[Participant]:
        """Who said nothing after a moment of the monotonic clock."""
        return [participant for participant in self._by_id.values() if participant.heard_at < moment]

    def weigh(self) -> None:
        self.backlog.weigh(participant.waiting_bytes for participant in self._by_id.values())

    def meet(self, one: Participant, other: Participant) -> None:
        """Remember that two exchanged something: when one goes, the other is told at once."""
        _remember(one.contacts, other.peer)
        _remember(other.contacts, one.peer)

    def tell_gone(self, participant: Participant, model: str | None) -> None:
        """Tell everyone whom the end of a connection concerns; `model` is what it announced, if anything."""
        concerned = {self._by_id[peer] for peer in participant.contacts if peer in self._by_id}
        if model is not None:
            concerned.update(self.watchers(None), self.watchers(model))
        concerned.discard(participant)
        message = encode(Gone(participant.peer))
        for other in concerned:
            other.contacts.pop(participant.peer, None)
            other.send_encoded(message)


def _remember(contacts: dict[PeerId, None], peer: PeerId) -> None:
    if peer in contacts:
        return
    if len(contacts) >= MAX_CONTACTS:
        del contacts[next(iter(contacts))]
    contacts[peer] = None
