"""Steps that come again and again: one position of each of so many sessions, through the same layers.

The family's Python takes a tenth of a token's time on a CPU with float32 weights, a fifth with 4-bit ones,
and most of it on a GPU. So the second such pass is recorded, the next ones are computed both ways and
compared, and from then on the recording alone is run; on a GPU as captured graphs, where those are faster.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch

from peer.model.cuda_graphs import Graph, GraphedStep
from peer.model.errors import first_line
from peer.model.recording import Recording, Unrecordable, record

log = logging.getLogger(__name__)

Step = Callable[..., torch.Tensor]

CHECKS = 2
"""Passes of which a recording must give what the family itself gives, before it is trusted."""
MOST = 32
"""Recordings that are kept; the least recently used is dropped."""


@dataclass(frozen=True)
class _Pass:
    """What runs now."""

    function: Step
    """As the family has it."""
    start_over: Callable[[], None]
    inputs: tuple[torch.Tensor, ...]


@dataclass
class _Course:
    """What is known of one kind of step."""

    seen: int = 0
    """Passes that the family computed in its own way, unwatched or recorded, and that came to their end."""
    recording: Recording | None = None
    step: Step | None = None
    """How to run the recording."""
    checks: int = 0
    own_s: float = 0.0
    """What the family's own way took in all checks, and what ours took."""
    our_s: float = 0.0


class Steps:
    """The recordings of one span. Its `run` is for one thread at a time."""

    def __init__(
        self,
        device: torch.device,
        constants: Callable[[], Iterable[torch.Tensor]],
        same: Callable[[torch.Tensor, torch.Tensor], bool],
        graph: Callable[[], Graph] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`constants` gives the tensors of the model; `same` says whether two results are equal enough.

        With `graph` recordings are captured, each piece in a new one.
        """
        self._device = device
        self._constants = constants
        self._same = same
        self._graph = graph
        self._clock = clock
        self._courses: OrderedDict[Hashable, _Course] = OrderedDict()

    @property
    def trusted(self) -> int:
        """Kinds of steps that are run from their recordings."""
        return sum(course.checks == CHECKS for course in self._courses.values())

    def run(
        self, kind: Hashable, function: Step, start_over: Callable[[], None], *inputs: torch.Tensor
    ) -> torch.Tensor:
        """`function(*inputs)`, or the same by its recording.

        All calls of one `kind` bring inputs of the same shapes. `start_over` undoes what the function did
        besides giving its result.
        """
        course = self._course(kind)
        if course.step is not None and course.checks == CHECKS:
            return course.step(*inputs)
        now = _Pass(function, start_over, inputs)
        if course.step is not None:
            return self._check(course, now)
        result = self._record(course, now) if course.seen == 1 else function(*inputs)
        course.seen += 1
        return result

    def _course(self, kind: Hashable) -> _Course:
        course = self._courses.setdefault(kind, _Course())
        self._courses.move_to_end(kind)
        if len(self._courses) > MOST:
            self._courses.popitem(last=False)
        return course

    def _record(self, course: _Course, now: _Pass) -> torch.Tensor:
        result, found = record(now.function, now.inputs, self._constants())
        if isinstance(found, Unrecordable):
            log.debug("this model's steps are not recorded: %s", found)
        else:
            course.recording = found
            course.step = self._captured(found, now)
        return result

    def _captured(self, recording: Recording, now: _Pass) -> Step:
        """As graphs, where they are wanted and nothing forbids it."""
        if self._graph is None:
            return recording.run
        now.start_over()
        try:
            return GraphedStep(recording, now.inputs, self._graph)
        except RuntimeError as error:
            log.debug("this model's steps are not captured as graphs: %s", first_line(error))
            return recording.run

    def _check(self, course: _Course, now: _Pass) -> torch.Tensor:
        assert course.step is not None and course.recording is not None
        own, own_s = self._timed(now.function, now.inputs)
        now.start_over()
        ours, our_s = self._timed(course.step, now.inputs)
        course.checks += 1
        course.own_s += own_s
        course.our_s += our_s
        if not self._same(ours, own):
            log.debug("this model's steps are not recorded: they do other things at other times")
            course.step = None
        elif self._graph is not None and course.checks == CHECKS and course.our_s > course.own_s:
            log.debug("this model's steps are not captured as graphs: they would take longer")
            course.step = course.recording.run
        return own

    def _timed(self, step: Step, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, float]:
        """The result, and the seconds until it was there."""
        self._wait()
        began = self._clock()
        result = step(*inputs)
        self._wait()
        return result, self._clock() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
