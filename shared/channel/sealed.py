"""The handshake of a channel, and the seal on what a relay carries. Pure: values in, values out.

Offer and answer each hold an ephemeral X25519 key (RFC 7748), signed by the sender's identity for this
receiver and this channel. The keys of the seal come from the agreed secret and a hash over both texts (HKDF,
RFC 5869), so whoever changes a letter on the way ends up with other keys. Each direction has its own
AES-256-GCM key (NIST SP 800-38D). The ephemeral keys are forgotten with the channel: a stolen identity opens
no recorded traffic. Sockets that the two open beside the relay have keys of their own, from the same secret.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from struct import Struct
from typing import Literal, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.errors import ProtocolError, StaleRecord
from shared.identity import Identity, PeerId, short, verify
from shared.protocol import Greeting, SignedRecord, decode, encode

GREETING_DOMAIN = "corolla-greeting-1"
KEYS_DOMAIN = b"corolla-channel-keys-1"
SOCKET_DOMAIN = b"corolla-socket-keys-1"
SOCKET_TAG_DOMAIN = b"corolla-socket-tag-1"

FRESH_S = 60.0
"""Clocks at home are off by seconds, so half of this is no sign of a replay."""
MAX_REMEMBERED = 4096

# What a sealed frame starts with: whose keys (the first half of the channel's name), and its number.
SEAL_HEADER = Struct("<8sQ")
SEAL_BYTES = SEAL_HEADER.size + 16


# ---------------------------------------------------------------- greetings


class Ephemeral(NamedTuple):
    """A key pair for one handshake, and the greeting that carries its public half."""

    secret: X25519PrivateKey
    greeting: Greeting
    record: SignedRecord


def make_offer(identity: Identity, receiver: PeerId, now: float, seen: str = "") -> Ephemeral:
    """The first half of a handshake, under a new channel name; `seen` is where a relay sees us."""
    return _greet(identity, "offer", receiver, secrets.token_hex(16), now, "", seen)


def make_answer(
    identity: Identity, offer: Greeting, offer_record: SignedRecord, now: float, seen: str = ""
) -> Ephemeral:
    """The second half, bound to the very text of the first."""
    answers = text_hash(offer_record.body)
    return _greet(identity, "answer", PeerId(offer.sender), offer.channel, now, answers, seen)


def _greet(
    identity: Identity,
    kind: Literal["offer", "answer"],
    receiver: PeerId,
    channel: str,
    now: float,
    answers: str,
    seen: str,
) -> Ephemeral:
    secret = X25519PrivateKey.generate()
    greeting = Greeting(
        kind=kind,
        sender=identity.id,
        receiver=receiver,
        channel=channel,
        key=secret.public_key().public_bytes_raw().hex(),
        issued_at=now,
        answers=answers,
        seen=seen,
    )
    body = encode(greeting)
    signature = identity.sign(GREETING_DOMAIN, body).hex()
    return Ephemeral(secret, greeting, SignedRecord(body.decode(), signature))


def read_greeting(record: SignedRecord, receiver: PeerId, now: float) -> Greeting:
    """The greeting in a record, if it is for `receiver`, fresh, and signed by its sender.

    Raises ProtocolError, StaleRecord or BadSignature. Whether it came before is for `SeenChannels` to say.
    """
    greeting: Greeting = decode(record.body, Greeting)
    if greeting.receiver != receiver or greeting.sender == receiver:
        raise ProtocolError(f"a greeting for {short(PeerId(greeting.receiver))} came to {short(receiver)}")
    if abs(greeting.issued_at - now) > FRESH_S:
        raise StaleRecord(
            f"a greeting of {short(PeerId(greeting.sender))} is {now - greeting.issued_at:.0f} s old:"
            f" {FRESH_S:.0f} s are allowed, so check both clocks"
        )
    # The costly check comes last: 0.15 ms.
    verify(PeerId(greeting.sender), GREETING_DOMAIN, record.body.encode(), bytes.fromhex(record.signature))
    return greeting


class SeenChannels:
    """Which offers came before, for as long as they would still count as fresh.

    Bounded. When full, the oldest is forgotten; its replay would then cost us an answer that nobody can use,
    since only the one who made the offer can prove to hold its key.
    """

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[str, str], float] = OrderedDict()

    def check(self, greeting: Greeting, now: float) -> None:
        """Remember this offer. Raises StaleRecord when it was here before."""
        while self._until and (next(iter(self._until.values())) < now or len(self._until) >= MAX_REMEMBERED):
            self._until.popitem(last=False)
        key = (greeting.sender, greeting.channel)
        if key in self._until:
            raise StaleRecord(f"an offer of {short(PeerId(greeting.sender))} came a second time")
        self._until[key] = now + 2 * FRESH_S


# ---------------------------------------------------------------- keys


class Keys(NamedTuple):
    """The two halves of a seal, from this side."""

    seal: Seal
    opener: Opener
    further: bytes = b""
    """What the keys of this channel's sockets are made from."""


def agree(own: Ephemeral, offer: SignedRecord, answer: SignedRecord, remote_key: str) -> Keys:
    """The keys that both ends arrive at. Raises ProtocolError when the other's public key is no good."""
    try:
        secret = own.secret.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(remote_key)))
    except ValueError:
        raise ProtocolError(
            "a greeting holds a key that agrees with nobody (RFC 7748, section 6.1)"
        ) from None
    transcript = hashlib.sha256(offer.body.encode()).digest() + hashlib.sha256(answer.body.encode()).digest()
    material = HKDF(SHA256(), length=96, salt=transcript, info=KEYS_DOMAIN).derive(secret)
    from_offerer, from_answerer, further = material[:32], material[32:64], material[64:]
    tag = channel_tag(own.greeting.channel)
    if own.greeting.kind == "offer":
        return Keys(Seal(from_offerer, tag), Opener(from_answerer, tag), further)
    return Keys(Seal(from_answerer, tag), Opener(from_offerer, tag), further)


def socket_tag(further: bytes, ticket: bytes) -> bytes:
    """What a hello on a listening port begins with, so that it finds the channel it is for.

    Nobody but the two ends can know it: not the relay, which knows the channel's own tag.
    """
    return HKDF(SHA256(), length=8, salt=ticket, info=SOCKET_TAG_DOMAIN).derive(further)


def socket_keys(further: bytes, ticket: bytes, nonce: bytes, *, dialling: bool) -> Keys:
    """The keys of one socket: the listening side drew the ticket, the dialling side the nonce."""
    material = HKDF(SHA256(), length=64, salt=ticket + nonce, info=SOCKET_DOMAIN).derive(further)
    from_dialler, from_listener = material[:32], material[32:]
    tag = socket_tag(further, ticket)
    if dialling:
        return Keys(Seal(from_dialler, tag), Opener(from_listener, tag))
    return Keys(Seal(from_listener, tag), Opener(from_dialler, tag))


def text_hash(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def channel_tag(channel: str) -> bytes:
    """What the frames of a channel begin with, so that its reader finds the keys."""
    return bytes.fromhex(channel[:16])


# ---------------------------------------------------------------- the seal


class Seal:
    """Seals what this side sends, numbering it upwards. The number is the nonce and is never used twice."""

    def __init__(self, key: bytes, tag: bytes) -> None:
        self._cipher = AESGCM(key)
        self._tag = tag
        self._count = 0

    def __call__(self, frame: bytes) -> tuple[bytes, bytes]:
        """Header and sealed frame, to be sent one after the other."""
        self._count += 1
        header = SEAL_HEADER.pack(self._tag, self._count)
        return header, self._cipher.encrypt(_nonce(self._count), frame, header)


class Opener:
    """Opens what the other side sealed. Whatever was altered, repeated or overtaken is not opened."""

    def __init__(self, key: bytes, tag: bytes) -> None:
        self._cipher = AESGCM(key)
        self._tag = tag
        self._count = 0
        self.opened = 0
        """How many frames did."""
        self.refused = 0
        """How many frames did not open. Only a relay that misbehaves, or a change of relay, makes it grow."""

    def __call__(self, sealed: bytes | memoryview) -> bytes | None:
        """The frame, or None when it is not the other side's next word."""
        if len(sealed) < SEAL_BYTES:
            self.refused += 1
            return None
        view = memoryview(sealed)
        header = view[: SEAL_HEADER.size]
        tag, count = SEAL_HEADER.unpack(header)
        if tag != self._tag or count <= self._count:
            self.refused += 1
            return None
        try:
            frame = self._cipher.decrypt(_nonce(count), view[SEAL_HEADER.size :], header)
        except InvalidTag:
            self.refused += 1
            return None
        # Only an opened frame counts: a forged number must not make us deaf to the true ones.
        self._count = count
        self.opened += 1
        return frame

    @property
    def whole(self) -> bool:
        """False when frames are missing before the newest."""
        return self.opened == self._count


def sealed_tag(sealed: bytes | memoryview) -> bytes:
    """Which channel a sealed frame says that it belongs to."""
    return bytes(sealed[:8])


def _nonce(count: int) -> bytes:
    return count.to_bytes(12, "little")
