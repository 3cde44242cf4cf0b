"""Tokens become text piece by piece, and no piece is ever taken back. Pure: no model, no clock, no socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST_WAIT = 256
"""Tokens that may wait for their text to become certain. A model that draws only broken bytes gets this far;
without an end, every token would cost more than the one before."""


class Detokenizer:
    """Gives out text as soon as it is certain: the pieces together are the text of all tokens together.

    A token may hold part of a character only, so bytes that can still become one wait. Tokenizers also
    treat a text's beginning specially (most drop a leading space), so a token is never decoded alone: the
    window starts with tokens whose text was given out before.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._overlap = 0
        """How many tokens at the window's start belong to the piece before."""
        self._told = ""
        """Their text."""

    def push(self, token: int) -> str:
        """One more token; returns the text that is certain now, often none."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._overlap
        # Broken bytes at the end may be the beginning of a character; and where each byte is a token, one
        # such beginning makes all bytes before it look broken too. So all of them wait.
        if text.endswith(BROKEN) and waiting < LONGEST_WAIT:
            return ""
        piece = text[len(self._told) :]
        if piece or waiting >= LONGEST_WAIT:
            self._advance()
        return piece

    def finish(self) -> str:
        """No more tokens: what waited comes out, broken or not."""
        text = self._decode(self._window)
        return text[len(self._told) :]

    def _advance(self) -> None:
        """Forget what came before the newest piece, so that the work per token stays the same."""
        self._window = self._window[self._overlap :]
        self._overlap = len(self._window)
        self._told = self._decode(self._window)


class StopStrings:
    """Ends a text before the first stop string, however the text is cut into pieces.

    The first is the one that is complete first, as if characters came one at a time.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None
        """The stop string that came: there is no more text."""

    @property
    def hit(self) -> bool:
        return self.found is not None

    def push(self, text: str) -> str:
        """More text; returns what cannot be part of a stop string any more."""
        if self.hit:
            return ""
        self._held += text
        if matches := [self._match(stop) for stop in self._stops if stop in self._held]:
            _, start, self.found = min(matches)
            return self._held[:start]
        return self._release(self._waiting())

    def finish(self) -> str:
        """The text ended by itself: a half stop string is text after all."""
        return "" if self.hit else self._release(0)

    def _match(self, stop: str) -> tuple[int, int, str]:
        start = self._held.index(stop)
        return start + len(stop), start, stop

    def _waiting(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, keep: int) -> str:
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text
