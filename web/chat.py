"""From a prompt to an answer's text, piece by piece. Knows the swarm and a tokenizer, but nothing of HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Literal, assert_never

import msgspec

from shared.client.session import Drawn, Rerouted
from shared.errors import ProtocolError
from shared.protocol import Hop, Likelihood
from web.line import Waiting
from web.logprobs import TokenBytes, TokenText, TokenTexts
from web.text import Decode, Detokenizer, StopStrings

FinishReason = Literal["stop", "length", "tool_calls"]


class TokenTrace(msgspec.Struct, frozen=True):
    """One token's way through the swarm, as it happened."""

    position: int
    ms: float
    """Since the token before it reached us; the first one's since the question was put."""
    hops: Sequence[Hop]


class Said(msgspec.Struct, frozen=True):
    """More of the answer, and the tokens that came since the last piece; some text waits for its end."""

    text: str
    tokens: list[TokenTrace]
    texts: Sequence[TokenText] = ()
    """The tokens that make the text, when the request asks how likely they are."""


class PromptScored(msgspec.Struct, frozen=True):
    """How likely the prompt's tokens were, all but the first one; comes before any text."""

    likelihoods: Sequence[Likelihood]


class Ended(msgspec.Struct, frozen=True):
    """The answer is complete. `tokens` came after the last piece; they have no text."""

    reason: FinishReason
    tokens: list[TokenTrace]
    token_count: int
    """Of the whole answer, with the stop token."""
    first_ms: float = 0.0
    """Until the first token came."""
    rest_ms: float = 0.0
    """From there to the last one."""
    stop: str | None = None
    """The stop string that ended it, if one did."""
    last: Likelihood | None = None
    """Of the stop token, which has no text."""


AnswerEvent = Said | PromptScored | Rerouted | Waiting | Ended


async def answer(
    events: AsyncGenerator[Drawn | Rerouted | Waiting, None],
    decode: Decode,
    stops: Sequence[str] = (),
    token_bytes: TokenBytes | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncGenerator[AnswerEvent, None]:
    """Tell the text of these tokens as soon as it is certain; exactly one `Ended` comes last.

    With `token_bytes` it also tells how likely they were, which the events have to say.

    Leaving the iteration ends the session at every peer. Raises what the events raise.
    """
    text = _Text(decode, stops, TokenTexts(token_bytes) if token_bytes else None)
    traces = _Traces(clock)
    stopped = False
    last: Likelihood | None = None
    async with aclosing(events):
        async for event in events:
            match event:
                case Drawn(stop=stopped):
                    traces.add(event)
                    last = _checked(event) if token_bytes else None
                    if event.prompt_likelihoods:
                        yield PromptScored(event.prompt_likelihoods)
                    if piece := "" if stopped else text.push(event.token, last):
                        yield Said(piece, traces.take(), text.take())
                    if text.ended:
                        break
                case Rerouted() | Waiting():
                    yield event
                case _:
                    assert_never(event)
    if (rest := text.finish()) or text.texts:
        yield Said(rest, traces.take(), text.take())
    reason: FinishReason = "stop" if stopped or text.ended else "length"
    yield Ended(
        reason,
        traces.take(),
        traces.count,
        traces.first_ms,
        traces.rest_ms,
        text.stop,
        last if stopped else None,
    )


def _checked(drawn: Drawn) -> Likelihood:
    """How likely the token was. Raises ProtocolError when nobody says."""
    if drawn.likelihood is None or drawn.likelihood.token != drawn.token:
        raise ProtocolError("the last peer of the route did not say how likely its token was")
    return drawn.likelihood


class _Text:
    """Tokens to text, cut at the first stop string."""

    def __init__(self, decode: Decode, stops: Sequence[str], tokens: TokenTexts | None) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(stops)
        self._tokens = tokens
        self.texts: list[TokenText] = []
        """Those of the text since it was last taken."""

    @property
    def ended(self) -> bool:
        return self._stops.hit

    @property
    def stop(self) -> str | None:
        """The stop string that came."""
        return self._stops.found

    def push(self, token: int, likelihood: Likelihood | None) -> str:
        certain = self._detokenizer.push(token)
        if self._tokens and likelihood:
            self._tokens.add(likelihood, certain)
        return self._tell(self._stops.push(certain))

    def finish(self) -> str:
        rest = ""
        if not self.ended:
            certain = self._detokenizer.finish()
            if self._tokens:
                self._tokens.settle(certain)
            rest = self._tell(self._stops.push(certain) + self._stops.finish())
        if self._tokens:
            self.texts += self._tokens.finish()
        return rest

    def take(self) -> list[TokenText]:
        taken, self.texts = self.texts, []
        return taken

    def _tell(self, text: str) -> str:
        if self._tokens:
            self.texts += self._tokens.tell(text)
        return text


class _Traces:
    """The tokens since the last piece of text, with the time between them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._waiting: list[TokenTrace] = []
        self.count = 0
        self.first_ms = 0.0
        self.rest_ms = 0.0

    def add(self, drawn: Drawn) -> None:
        now = self._clock()
        ms = (now - self._last) * 1000
        self._waiting.append(TokenTrace(drawn.position, ms, drawn.hops))
        if self.count == 0:
            self.first_ms = ms
        else:
            self.rest_ms += ms
        self._last = now
        self.count += 1

    def take(self) -> list[TokenTrace]:
        taken, self._waiting = self._waiting, []
        return taken
