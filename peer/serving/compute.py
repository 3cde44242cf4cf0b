"""Steps through a span, from wire bytes to wire bytes. Runs in the executor thread; knows no channels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from peer.model.constraint import Constraint
from peer.model.errors import BadInputs
from peer.model.kv_cache import KVCache
from peer.model.likelihood import likelihoods
from peer.model.sampling import sample
from peer.model.span import Row, Span
from peer.wire_tensors import FROM_WIRE, TO_WIRE
from shared.protocol import Likelihood, Sampling, Step, Tensor, WireDtype
from shared.tensors import tensor_bytes

MOST_SCORED = 64
"""Positions of a prompt that is scored, in one pass. Each needs all its logits, half a megabyte or more."""


class Computed(msgspec.Struct, frozen=True):
    """What a step gave: hidden states for the next hop, or a token where the model ends."""

    tensor: Tensor | None
    body: bytes
    token: int | None
    likelihood: Likelihood | None
    """Of the token, when the asker wants to know."""
    scores: list[Likelihood]
    """Of the prompt's tokens that follow the step's positions, when the asker wants to know."""
    ended: float
    """`time.perf_counter()` when the computation ended; only differences leave this machine."""
    computed_ms: float
    """All the time of each pass that the step was in, whoever else was in it: a token waits for all of it."""


class Draw(msgspec.Struct, frozen=True):
    """How the last hop draws a token from the logits."""

    sampling: Sampling
    history: Sequence[int]
    prompt_length: int
    constraint: Constraint | None = None

    def token(self, logits: torch.Tensor, position: int) -> int:
        """The token at `position`, by logits [vocab]. Raises BadLogits or BadGrammar."""
        generated = self.history[self.prompt_length :]
        allowed = self.constraint.allowed(generated) if self.constraint else None
        return sample(logits, self.sampling, position, self.history, self.prompt_length, allowed)


class Score(msgspec.Struct, frozen=True):
    """Tokens of the prompt, each after one of a step's positions; the asker wants to know how likely."""

    tokens: Sequence[int]
    top: int


class Work:
    """A step on its way through a span, in one pass or piece by piece; `error` is what went wrong with it."""

    def __init__(
        self,
        cache: KVCache,
        step: Step,
        body: bytes | memoryview,
        draw: Draw | None = None,
        in_background: Callable[[], bool] = lambda: False,
        score: Score | None = None,
    ) -> None:
        self.cache = cache
        self.in_background = in_background
        self.error: Exception | None = None
        self.computed_ms = 0.0
        self.ended = 0.0
        self._step = step
        self._body = body
        self._draw = draw
        self._score = score
        self._done = 0
        self._inputs: torch.Tensor | None = None
        self._states: list[torch.Tensor] = []
        self._token: int | None = None
        self._likelihood: Likelihood | None = None
        self._scores: list[Likelihood] = []
        self._wire: tuple[Tensor | None, bytes] = (None, b"")

    @property
    def left(self) -> int:
        """Positions still to be computed; 0 when the step is over, well or badly."""
        return 0 if self.error is not None else self._step.count - self._done

    @property
    def most(self) -> int:
        """Positions of it that a pass may compute."""
        return self.left if self._score is None else min(self.left, MOST_SCORED)

    def row(self, span: Span, count: int) -> Row:
        """The next `count` positions as a row of a pass. Raises BadInputs or CacheFull."""
        if self._inputs is None:
            self._inputs = _inputs(self._step, self._body)
        last = 1 if self._draw is not None and count == self.left else 0
        return span.row(
            self._inputs[:, self._done : self._done + count],
            self.cache,
            self._step.position + self._done,
            wanted=last if self._score is None else count,
        )

    def take(self, span: Span, row: Row, output: torch.Tensor | None) -> None:
        """Keep what a pass gave. After the last piece: draw the token, or write the states as on the wire.

        Raises BadInputs, BadLogits or BadGrammar.
        """
        before = self._done
        self._done += row.count
        if self.cache.end < span.layer_count and output is not None:
            self._states.append(output[0])
            if not self.left:
                self._wire = _to_wire(torch.cat(self._states))
        elif output is not None:
            if self._score is not None:
                tokens = self._score.tokens[before : self._done]
                self._scores += likelihoods(output[0, : len(tokens)], tokens, self._score.top)
            if self._draw is not None and not self.left:
                self._take_token(self._draw, output[0, -1])

    def _take_token(self, draw: Draw, logits: torch.Tensor) -> None:
        self._token = draw.token(logits, self._step.position + self._step.count)
        if draw.sampling.likelihoods is not None:
            (self._likelihood,) = likelihoods(logits[None], [self._token], draw.sampling.likelihoods)

    def result(self) -> Computed:
        """What the step gave. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        return Computed(
            *self._wire, self._token, self._likelihood, self._scores, self.ended, self.computed_ms
        )


def compute_pass(span: Span, shares: Sequence[tuple[Work, int]]) -> float:
    """Compute the next positions of each work, so many of each, in one forward pass. Gives its milliseconds.

    All go through the same layers. What goes wrong with one work becomes its `error`, and stops no other.
    """
    started = time.perf_counter()
    rows: list[tuple[Work, Row]] = []
    for work, count in shares:
        try:
            rows.append((work, work.row(span, count)))
        except Exception as error:
            work.error = error
    for work, row, output in _forward(span, rows):
        try:
            work.take(span, row, output)
        except Exception as error:
            work.error = error
    ended = time.perf_counter()
    for work, _ in shares:
        work.ended = ended
        work.computed_ms += (ended - started) * 1000
    return (ended - started) * 1000


def _forward(span: Span, rows: Sequence[tuple[Work, Row]]) -> list[tuple[Work, Row, torch.Tensor | None]]:
    try:
        outputs = span.forward_rows([row for _, row in rows])
    except Exception as error:
        if len(rows) == 1:
            rows[0][0].error = error
            return []
        # Whose fault it was shows when each is alone. Some layers may have kept the new positions already.
        for _, row in rows:
            row.cache.truncate(row.cache.length)
        return [result for pair in rows for result in _forward(span, [pair])]
    return [(work, row, output) for (work, row), output in zip(rows, outputs, strict=True)]


def row_bytes(span: Span) -> int:
    """Bytes of one position's hidden states on the wire, where they travel as computed, without rounding."""
    return span.hidden_size * span.dtype.itemsize


def wire_dtype(span: Span) -> WireDtype:
    """The format in which this span's hidden states travel."""
    return TO_WIRE[span.dtype]


def _inputs(step: Step, body: bytes | memoryview) -> torch.Tensor:
    """[1, count] token ids or [1, count, hidden] hidden states; the span checks that they fit it."""
    dtype = FROM_WIRE[step.tensor.dtype]
    if step.tensor.shape[:1] != [step.count] or not len(body) or len(body) != tensor_bytes(step.tensor):
        raise BadInputs(
            f"{len(body)} bytes of {step.tensor.dtype} {step.tensor.shape} are not {step.count} positions"
        )
    # A copy: torch wants memory that is its own and writable.
    raw: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(body, dtype=np.uint8).copy()
    inputs = torch.from_numpy(raw).view(dtype).view(1, *step.tensor.shape)
    if inputs.is_floating_point() and not torch.isfinite(inputs).all():
        raise BadInputs("the hidden states hold numbers that are not finite")
    return inputs


def _to_wire(hidden: torch.Tensor) -> tuple[Tensor, bytes]:
    hidden = hidden.detach().to("cpu").contiguous()
    if not torch.isfinite(hidden).all():
        raise BadInputs("the layers gave numbers that are not finite")
    wire = hidden.view(torch.uint8).numpy().tobytes()
    return Tensor(TO_WIRE[hidden.dtype], list(hidden.shape)), wire
