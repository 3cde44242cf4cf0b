"""Which token made which part of a text, with how likely it was. Pure: no model, no clock, no socket.

Texts come in pieces that may wait (half a character, a stop string that may still come); what is told of
tokens waits with them. So the bytes of all tokens told are the bytes of the text told.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from shared.protocol import Likelihood

TokenBytes = Callable[[int], bytes]
"""What a token adds to a text; nothing for special tokens."""


class TokenText(msgspec.Struct, frozen=True):
    """One token's part of a text."""

    text: str
    """The characters that it completes; half a character is part of the token that brings its end."""
    raw: bytes
    likelihood: Likelihood


class TokenTexts:
    """Give it each token with the text that became certain by it, and then the text that is told."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._uncertain: list[Likelihood] = []
        self._certain: deque[tuple[bytes, Likelihood]] = deque()
        self._told = 0
        """Bytes that were told beyond those of the tokens given out."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, likelihood: Likelihood, text: str) -> None:
        """A token, and the text that is certain since it came, which may be that of tokens before it too."""
        self._uncertain.append(likelihood)
        if text:
            self.settle(text)

    def settle(self, text: str) -> None:
        """The tokens that wait made this text."""
        raws = share(text.encode(), [self._token_bytes(each.token) for each in self._uncertain])
        self._certain.extend(zip(raws, self._uncertain, strict=True))
        self._uncertain.clear()

    def tell(self, text: str) -> list[TokenText]:
        """The tokens whose part of the text is told now."""
        self._told += len(text.encode())
        told = []
        while self._certain and len(self._certain[0][0]) <= self._told:
            raw, likelihood = self._certain.popleft()
            self._told -= len(raw)
            told.append(self._text(raw, likelihood))
        return told

    def finish(self) -> list[TokenText]:
        """The text is at its end: of a token that a stop string cuts, the part before it."""
        if not self._told or not self._certain:
            return []
        raw, likelihood = self._certain.popleft()
        return [self._text(raw[: self._told], likelihood)]

    def _text(self, raw: bytes, likelihood: Likelihood) -> TokenText:
        return TokenText(self._decoder.decode(raw), raw, likelihood)


def share(text: bytes, raws: Sequence[bytes]) -> list[bytes]:
    """The bytes of a text, shared among the tokens that made it together.

    Where the tokens' own bytes do not add up to the text (a tokenizer drops the first space of a text, broken
    bytes become a sign), the difference goes to the first token, or all of it to the last one.
    """
    if not raws:
        return []
    rest = b"".join(raws[1:])
    if text.endswith(rest) and (raws[0].endswith(text[: len(text) - len(rest)]) or len(raws) == 1):
        return [text[: len(text) - len(rest)], *raws[1:]]
    return [*(b"" for _ in raws[1:]), text]


def token_texts(likelihoods: Sequence[Likelihood], token_bytes: TokenBytes) -> list[TokenText]:
    """Tokens whose text is simply what they add."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    raws = [token_bytes(each.token) for each in likelihoods]
    return [TokenText(decoder.decode(raw), raw, each) for raw, each in zip(raws, likelihoods, strict=True)]
