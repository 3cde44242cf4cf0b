"""Who a participant is: an Ed25519 key, whose public half is its id (RFC 8032)."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import BadSignature, ProtocolError, SettingsError

PeerId = NewType("PeerId", str)
"""64 lower-case hexadecimal digits: the Ed25519 public key of a participant."""

ID_BYTES = 32


class Identity:
    """A participant's key. `id` may be told to anyone; the key never leaves its file."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.id = PeerId(key.public_key().public_bytes_raw().hex())

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read the key at `path`, or make one there that only its owner can read.

        Raises SettingsError when the file is there but is no key.
        """
        try:
            secret = path.read_bytes()
        except FileNotFoundError:
            return cls._create(path)
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(secret))
        except ValueError:
            raise SettingsError(f"{path} is not an identity key: remove it to have a new one made") from None

    @classmethod
    def _create(cls, path: Path) -> Identity:
        identity = cls.generate()
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_EXCL and the final mode at once: the key is never readable by others, not even for a moment.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(identity._key.private_bytes_raw())
        return identity

    def sign(self, domain: str, payload: bytes) -> bytes:
        """64 bytes over domain and payload; a signature for one domain is worth nothing in another."""
        return self._key.sign(_domain_bytes(domain) + payload)


def verify(peer: PeerId, domain: str, payload: bytes, signature: bytes) -> None:
    """Raise BadSignature unless `peer` signed this payload for this domain."""
    try:
        Ed25519PublicKey.from_public_bytes(id_bytes(peer)).verify(signature, _domain_bytes(domain) + payload)
    except InvalidSignature:
        raise BadSignature(f"{domain} record is not signed by {short(peer)}") from None


@lru_cache(maxsize=4096)
def id_bytes(peer: PeerId) -> bytes:
    """The 32 bytes of an id. Raises ProtocolError when the text is not an id."""
    try:
        raw = bytes.fromhex(peer)
    except ValueError:
        raw = b""
    if len(raw) != ID_BYTES or peer != raw.hex():
        raise ProtocolError(f"{peer[:80]!r} is not a participant id: expected 64 lower-case hex digits")
    return raw


def id_from_bytes(raw: bytes | memoryview) -> PeerId:
    return PeerId(bytes(raw).hex())


def short(peer: PeerId) -> str:
    """The first eight digits, for people."""
    return peer[:8]


def _domain_bytes(domain: str) -> bytes:
    return domain.encode() + b"\0"
