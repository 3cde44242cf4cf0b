"""Carry sealed frames between two participants that have no direct path. Never reads them.

A frame starts with 32 bytes: the id of its destination on the way to the relay, of its source from there on.
"""

from __future__ import annotations

from msgspec import Struct

from relay.participants import Participant, Participants
from shared.identity import ID_BYTES, id_from_bytes, short
from shared.protocol import MAX_CHUNK_BYTES, Denied, Gone

MAX_PAYLOAD_BYTES = MAX_CHUNK_BYTES + 256
"""A chunk with its header and seal."""


class FrameCounts(Struct):
    """What became of all frames since the relay started."""

    forwarded: int = 0
    forwarded_bytes: int = 0
    undeliverable: int = 0
    dropped: int = 0


def forward(participants: Participants, sender: Participant, frame: memoryview, counts: FrameCounts) -> None:
    """Pass a frame on, or tell its sender why not.

    The receiver's backlog is bounded and nobody waits for it: one slow reader costs its own senders a
    frame, never anyone else a moment.
    """
    length = len(frame) - ID_BYTES
    if not 0 <= length <= MAX_PAYLOAD_BYTES:
        sender.send(
            Denied(
                f"a frame carries a 32-byte id and at most {MAX_PAYLOAD_BYTES} bytes, not {len(frame)} in all"
            )
        )
        return
    destination = bytes(frame[:ID_BYTES])
    receiver = participants.at(destination)
    if receiver is None:
        counts.undeliverable += 1
        sender.send(Gone(id_from_bytes(destination)))
        return
    participants.meet(sender, receiver)
    if receiver.send_frame(sender.raw_id, frame[ID_BYTES:]):
        counts.forwarded += 1
        counts.forwarded_bytes += length
    else:
        counts.dropped += 1
        sender.send(
            Denied(f"{short(receiver.peer)} reads too slowly: a frame was dropped", peer=receiver.peer)
        )
