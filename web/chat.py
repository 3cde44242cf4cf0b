"""From a prompt to an answer's text, piece by piece. Knows the swarm and a tokenizer, but nothing of HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Literal, assert_never

import msgspec

from shared.client.session import Drawn, Rerouted
from shared.protocol import Hop
from web.line import Waiting
from web.text import Decode, Detokenizer, StopStrings

FinishReason = Literal["stop", "length"]


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


class Ended(msgspec.Struct, frozen=True):
    """The answer is complete. `tokens` came after the last piece; they have no text."""

    reason: FinishReason
    tokens: list[TokenTrace]
    token_count: int
    """Of the whole answer, with the stop token."""


AnswerEvent = Said | Rerouted | Waiting | Ended


async def answer(
    events: AsyncGenerator[Drawn | Rerouted | Waiting, None],
    decode: Decode,
    stops: Sequence[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncGenerator[AnswerEvent, None]:
    """Tell the text of these tokens as soon as it is certain; exactly one `Ended` comes last.

    Leaving the iteration ends the session at every peer. Raises what the events raise.
    """
    text = _Text(decode, stops)
    traces = _Traces(clock)
    stopped = False
    async with aclosing(events):
        async for event in events:
            match event:
                case Drawn(stop=stopped):
                    traces.add(event)
                    if piece := "" if stopped else text.push(event.token):
                        yield Said(piece, traces.take())
                    if text.ended:
                        break
                case Rerouted() | Waiting():
                    yield event
                case _:
                    assert_never(event)
    if rest := text.finish():
        yield Said(rest, traces.take())
    yield Ended("stop" if stopped or text.ended else "length", traces.take(), traces.count)


class _Text:
    """Tokens to text, cut at the first stop string."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(stops)

    @property
    def ended(self) -> bool:
        return self._stops.hit

    def push(self, token: int) -> str:
        return self._stops.push(self._detokenizer.push(token))

    def finish(self) -> str:
        if self.ended:
            return ""
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()


class _Traces:
    """The tokens since the last piece of text, with the time between them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._waiting: list[TokenTrace] = []
        self.count = 0

    def add(self, drawn: Drawn) -> None:
        now = self._clock()
        self._waiting.append(TokenTrace(drawn.position, (now - self._last) * 1000, drawn.hops))
        self._last = now
        self.count += 1

    def take(self) -> list[TokenTrace]:
        taken, self._waiting = self._waiting, []
        return taken
