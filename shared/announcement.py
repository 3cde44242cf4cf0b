"""Signed announcements: how they are made, when they are believed, and which of two is the newer one.

Pure: time is passed in, in seconds since 1970. Relays, gateways and peers all judge by these rules, so
they agree without asking each other.
"""

from __future__ import annotations

import hashlib

from msgspec import Struct

from shared.errors import ProtocolError, StaleRecord
from shared.identity import Identity, short, verify
from shared.protocol import Announcement, Count, SignedRecord, decode, encode, peer_id

DOMAIN = "corolla-announce-1"

# Three missed renewals: home Wi-Fi often drops one, and a false "gone" costs a whole prefill.
LEASE_S = 45.0
RENEW_EVERY_S = 15.0
MAX_LEASE_S = 300.0
"""The longest lease that is believed: how long a peer that vanished can haunt the swarm."""
CLOCK_SKEW_S = 120.0
"""How far ahead of ours another participant's clock may be."""
MAX_ANNOUNCEMENT_BYTES = 4096
"""Relays keep and repeat announcements to everyone, so one may not be large."""


def sign_announcement(identity: Identity, announcement: Announcement) -> SignedRecord:
    """The announcement as its peer's signed record. Raises ProtocolError when nobody would believe it."""
    if announcement.peer != identity.id:
        raise ProtocolError(
            f"an announcement of {short(peer_id(announcement.peer))} needs that peer's own key"
        )
    try:
        body = encode(announcement)
    except TypeError as error:
        # A name from the command line may hold bytes that are no text.
        raise ProtocolError(f"an announcement cannot be written down: {error}") from None
    _check_size(body)
    # Structs are not checked when they are built in Python; reading the text back is.
    _check_lease(decode(body, Announcement))
    _check_layers(announcement)
    return SignedRecord(body=body.decode(), signature=identity.sign(DOMAIN, body).hex())


def read_announcement(record: SignedRecord, now: float) -> Announcement:
    """What a record says, if it is well formed, signed by the peer it names, and valid at `now`.

    Raises ProtocolError, BadSignature or StaleRecord.
    """
    body = _body_bytes(record)
    _check_size(body)
    announcement: Announcement = decode(body, Announcement)
    verify(peer_id(announcement.peer), DOMAIN, body, _signature_bytes(record))
    _check_lease(announcement)
    _check_clock(announcement, now)
    _check_layers(announcement)
    return announcement


def newer(one: SignedRecord, other: SignedRecord) -> SignedRecord:
    """Which of two records of the same peer holds: the higher sequence, on a tie the lowest hash.

    A choice by a total order: whoever has heard the same records, in any order and any number of times,
    holds the same one. Two bodies with one sequence mean that a key was copied; the choice is still the same
    everywhere. Raises ProtocolError when a body has no sequence.
    """
    return min(one, other, key=_order)


class _Sequenced(Struct):
    """The one field of an announcement that decides which is newer."""

    sequence: Count


def _order(record: SignedRecord) -> tuple[int, bytes, str]:
    body = _body_bytes(record)
    sequence: int = decode(body, _Sequenced).sequence
    # The signature comes last, so that two signatures over one body are ordered too.
    return -sequence, hashlib.sha256(body).digest(), record.signature


def _body_bytes(record: SignedRecord) -> bytes:
    try:
        return record.body.encode()
    except UnicodeEncodeError:
        raise ProtocolError("an announcement is not valid text") from None


def _signature_bytes(record: SignedRecord) -> bytes:
    try:
        return bytes.fromhex(record.signature)
    except ValueError:
        raise ProtocolError("the signature of an announcement is not hexadecimal") from None


def _check_size(body: bytes) -> None:
    if len(body) > MAX_ANNOUNCEMENT_BYTES:
        raise ProtocolError(
            f"an announcement may have {MAX_ANNOUNCEMENT_BYTES} bytes at most, this one has {len(body)}"
        )


def _check_lease(announcement: Announcement) -> None:
    lease_s = announcement.expires_at - announcement.issued_at
    if not 0 < lease_s <= MAX_LEASE_S:
        raise ProtocolError(
            f"an announcement needs a lease above 0 and at most {MAX_LEASE_S:.0f} s, not {lease_s:.0f} s"
        )


def _check_clock(announcement: Announcement, now: float) -> None:
    who = short(peer_id(announcement.peer))
    ahead_s = announcement.issued_at - now
    if ahead_s > CLOCK_SKEW_S:
        raise StaleRecord(f"the announcement of {who} is dated {ahead_s:.0f} s ahead: is a clock wrong?")
    if announcement.expires_at <= now:
        raise StaleRecord(f"the announcement of {who} expired {now - announcement.expires_at:.0f} s ago")
    # A sequence number is at most the time in milliseconds: a peer whose clock once ran far ahead could
    # otherwise never be heard again with a number that anyone accepts as newer.
    if announcement.sequence > (now + CLOCK_SKEW_S) * 1000:
        raise StaleRecord(
            f"the sequence number of {who} is ahead of the time in milliseconds: is a clock wrong?"
        )


def _check_layers(announcement: Announcement) -> None:
    if announcement.state == "left":
        return
    start, end, layer_count = announcement.start, announcement.end, announcement.layer_count
    if not start < end <= layer_count:
        raise ProtocolError(f"layers {start}–{end} are not a run of layers in a model that has {layer_count}")
