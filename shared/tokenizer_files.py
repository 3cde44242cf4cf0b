"""A tokenizer and chat template as they travel: small text files in one body, named by a hash."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping

from shared.errors import ProtocolError
from shared.protocol import Files


def files_hash(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents in the order of the names, as hex."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def pack_files(request: int, files: Mapping[str, bytes]) -> tuple[Files, bytes]:
    """The answer to a `Fetch`: the message and its body."""
    names = sorted(files)
    message = Files(request, names, [len(files[name]) for name in names])
    return message, b"".join(files[name] for name in names)


def split_files(message: Files, body: bytes) -> dict[str, bytes]:
    """The named files out of one body. Raises ProtocolError when the sizes do not add up."""
    if len(message.names) != len(message.sizes) or sum(message.sizes) != len(body):
        raise ProtocolError("a Files message whose sizes do not fit its body")
    ends = itertools.accumulate(message.sizes)
    parts = zip(message.names, message.sizes, ends, strict=True)
    return {name: body[end - size : end] for name, size, end in parts}
