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

from peer.model.cuda_graphs import GraphedStep, Graphs
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
    recorded_with: tuple[torch.Tensor, ...] = ()
    recording: Recording | None = None
    step: Step | None = None
    """How to run the recording; None without one that can be used."""
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
        graphs: Graphs | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`constants` gives the tensors of the model; `same` says whether two results are equal enough.

        With `graphs` recordings are captured.
        """
        self._device = device
        self._constants = constants
        self._same = same
        self._graphs = graphs
        self._clock = clock
        self._courses: OrderedDict[Hashable, _Course] = OrderedDict()

    @property
    def trusted(self) -> int:
        """Kinds of steps that are run from their recordings."""
        return sum(course.step is not None and course.checks == CHECKS for course in self._courses.values())

    def run(
        self, kind: Hashable, function: Step, start_over: Callable[[], None], *inputs: torch.Tensor
    ) -> torch.Tensor:
        """`function(*inputs)`, or the same by its recording.

        All calls of one `kind` bring inputs of the same shapes. `start_over` undoes what the function did
        besides giving its result.
        """
        course = self._course(kind)
        now = _Pass(function, start_over, inputs)
        if course.step is not None and course.checks < CHECKS:
            return self._check(course, now)
        if course.step is not None:
            found = self._ours(course, course.step, now)
            return function(*inputs) if found is None else found
        result = self._record(course, now) if course.seen == 1 else function(*inputs)
        course.seen += 1
        return result

    def _ours(self, course: _Course, step: Step, now: _Pass) -> torch.Tensor | None:
        """By the recording; None, and never again, if that goes wrong: the family's own way is there."""
        try:
            return step(*now.inputs)
        except Exception as error:
            log.warning("a recorded step failed and is not used again: %s", first_line(error))
            course.step = None
            now.start_over()
            return None

    def _course(self, kind: Hashable) -> _Course:
        course = self._courses.setdefault(kind, _Course())
        self._courses.move_to_end(kind)
        if len(self._courses) > MOST:
            self._courses.popitem(last=False)
        return course

    def _record(self, course: _Course, now: _Pass) -> torch.Tensor:
        try:
            result, found = record(now.function, now.inputs, self._constants())
        except Exception as error:
            # Perhaps because it was watched; if not, it says so again.
            log.debug("this model's steps are not recorded: %s", first_line(error))
            course.seen += 1
            now.start_over()
            return now.function(*now.inputs)
        if isinstance(found, Unrecordable):
            log.debug("this model's steps are not recorded: %s", found)
            return result
        course.recorded_with = tuple(each.clone() for each in now.inputs)
        course.recording = found
        course.step = found.run
        if self._graphs is not None:
            course.step = self._captured(found, self._graphs, now)
            # What capturing has left in the caches was not checked by anyone.
            now.start_over()
            result = now.function(*now.inputs)
        return result

    def _captured(self, recording: Recording, graphs: Graphs, now: _Pass) -> Step:
        """As graphs, where nothing forbids it."""
        try:
            # What cannot be captured shows here, where it does no harm.
            with graphs.rehearsal():
                now.start_over()
                recording.run(*(each.clone() for each in now.inputs))
            now.start_over()
            return GraphedStep(recording, now.inputs, graphs)
        except Exception as error:
            log.warning("steps are not captured as graphs on this device: %s", first_line(error))
            self._graphs = None
            return recording.run

    def _check(self, course: _Course, now: _Pass) -> torch.Tensor:
        """Compute both ways. What the family's own way keeps in the caches comes last, and stays."""
        pairs = zip(now.inputs, course.recorded_with, strict=True)
        if course.step is None or all(torch.equal(one, other) for one, other in pairs):
            return now.function(*now.inputs)  # the same numbers again would show nothing
        began = self._now()
        ours = self._ours(course, course.step, now)
        between = self._now()
        now.start_over()
        own = now.function(*now.inputs)
        course.our_s += between - began
        course.own_s += self._now() - between
        course.checks += 1
        if ours is None:
            return own
        if not self._same(ours, own):
            log.warning("a recorded step gave other numbers, and is not used")
            course.step = None
        elif self._graphs is not None and course.checks == CHECKS and course.our_s > course.own_s:
            log.debug("this step is not captured as graphs: they would take longer")
            course.step = course.recording.run if course.recording else None
        return own

    def _now(self) -> float:
        """When all is computed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
