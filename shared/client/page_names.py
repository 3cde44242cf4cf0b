"""Name the pages of a text, so that hops can tell which sessions begin alike without knowing the tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from shared.protocol import PREFIX_PAGE


class PageNames:
    """Names under one key. Of two texts, the first n names are equal when their first n pages are.

    Later hops never see the tokens. Without the asker's own key they could find a short text by trying.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def names(self, tokens: Sequence[int]) -> list[str]:
        """A name of 32 hex digits for each whole page; what is behind the last whole page has none."""
        names: list[str] = []
        before = b""
        for start in range(0, len(tokens) - PREFIX_PAGE + 1, PREFIX_PAGE):
            page = array("i", tokens[start : start + PREFIX_PAGE]).tobytes()
            before = hashlib.blake2b(before + page, digest_size=16, key=self._key).digest()
            names.append(before.hex())
        return names
