"""Steps that are run from their recordings give what the family's own forward pass gives, at any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peer.model.cuda_graphs import GraphedStep
from peer.model.kv_cache import KVCache
from peer.model.recording import Recording, aside, record
from peer.model.span import Span
from peer.model.steps import CHECKS, MOST, Steps
from tests.peer.model.families import CAPACITY, LAYERS, Tiny, every_family, random_tokens, tiny
from tests.peer.model.quantizations import FAST, quantization
from tests.peer.model.test_joint import ONE_BY_ONE

LENGTH = 24
LEARNING = 2 + CHECKS
"""Passes of one kind before the recording alone is run."""
GATHERED = {"deepseek-v2", "deepseek-v3"}
"""Families that make keys and values of all that is kept: another shape in every step."""
CPU = torch.device("cpu")


Kernel = tuple[Callable[..., Any], Sequence[Any], dict[str, Any], Any]
"""What was called, with what, and what it gave."""


class Noting(TorchDispatchMode):
    """Notes every kernel that runs."""

    def __init__(self, kernels: list[Kernel]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        self._kernels.append((func, args, kwargs or {}, result))
        return result


class Emulation:
    """Graphs of a device that is played."""

    def __init__(self, graph: Callable[[], Emulated] | None = None) -> None:
        self.new = graph or Emulated

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        yield


class Emulated:
    """A graph as CUDA's are: repeats each kernel on the very memory that it was captured with."""

    made = 0

    def __init__(self) -> None:
        self._kernels: list[Kernel] = []
        Emulated.made += 1

    def capture(self, function: Callable[[], None]) -> None:
        with Noting(self._kernels):
            function()
        # Capturing computes nothing: what is there before the first replay is whatever lay in memory.
        for _, args, _, results in self._kernels:
            taken = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if is_tensor(each)}
            for each in tree_leaves(results):
                if is_tensor(each) and each.untyped_storage().data_ptr() not in taken:
                    each.zero_()

    def replay(self) -> None:
        for func, args, kwargs, places in self._kernels:
            results = func(*args, **kwargs)
            for result, place in zip(tree_leaves(results), tree_leaves(places), strict=True):
                if is_tensor(place):
                    place.copy_(result)


def standing_clock() -> float:
    """Emulated graphs are as slow as the machine likes; these tests are about their numbers."""
    return 0.0


def advance(
    spans: Sequence[Span], sessions: Sequence[Sequence[KVCache]], states: list[torch.Tensor]
) -> list[torch.Tensor]:
    """One position of each session through all spans, to logits [vocab] of each."""
    found: list[torch.Tensor | None] = list(states)
    for index, span in enumerate(spans):
        rows = [
            span.row(state, caches[index], caches[index].length)
            for state, caches in zip(found, sessions, strict=True)
            if state is not None
        ]
        found = span.forward_rows(rows)
    return [each[0, -1] for each in found if each is not None]


def check_against_the_whole(model: Tiny, spans: Sequence[Span], held: Sequence[int], steps: int) -> None:
    """Sessions that hold so many positions take so many steps together; each logit is the whole model's."""
    texts = [random_tokens(1, count + steps) for count in held]
    sessions = [[span.new_cache(span.start, span.end, CAPACITY) for span in spans] for _ in held]
    for text, caches, count in zip(texts, sessions, held, strict=True):
        states = text[:, :count]
        for span, cache in zip(spans, caches, strict=True):
            states = span.forward(states, cache, 0, all_logits=True)
    expected = [model.expected(text) for text in texts]
    for number in range(steps):
        places = [count + number for count in held]
        ids = [text[:, place : place + 1] for text, place in zip(texts, places, strict=True)]
        logits = advance(spans, sessions, ids)
        for mine, whole, place in zip(logits, expected, places, strict=True):
            torch.testing.assert_close(mine, whole[0, place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", every_family())
def test_every_family_computes_the_same_from_its_recordings(family: str) -> None:
    """Past the sliding windows, alone and in company."""
    torch.manual_seed(3)
    model = tiny(family)
    for span in model.spans:
        span.record_steps(None)
    recorded = family not in ONE_BY_ONE | GATHERED
    check_against_the_whole(model, model.spans, [5], LENGTH - 5)
    assert {span.recorded_steps for span in model.spans} == {int(recorded)}
    check_against_the_whole(model, model.spans, [3, 9, 1], LEARNING + 4)
    assert {span.recorded_steps for span in model.spans} == {2 * recorded}


@pytest.mark.parametrize("family", every_family(but=ONE_BY_ONE | GATHERED))
def test_every_family_computes_the_same_in_captured_graphs(family: str) -> None:
    torch.manual_seed(4)
    model = tiny(family)
    captured = Emulated.made
    for span in model.spans:
        span.record_steps(Emulation(), standing_clock)
    check_against_the_whole(model, model.spans, [5], LENGTH - 5)
    check_against_the_whole(model, model.spans, [3, 9], LEARNING + 4)
    # In each span a piece before the first layer's look at the cache, between two, and after the last.
    assert Emulated.made - captured == 2 * sum(span.end - span.start + 1 for span in model.spans)
    assert {span.recorded_steps for span in model.spans} == {2}
    for span in model.spans:
        span.record_steps(None)


# ---------------------------------------------------------------- one family is enough for the rest


@pytest.mark.parametrize("kind", FAST)
def test_packed_weights_give_the_same_bits_from_a_recording(kind: str) -> None:
    span = Span.load(tiny("llama").checkpoint, 0, LAYERS, quantization=quantization(kind))
    text = random_tokens(1, LENGTH)
    caches = [span.new_cache(0, LAYERS, CAPACITY) for _ in range(2)]
    found = [
        [
            span.forward_rows([span.row(text[:, place : place + 1], cache, place)])[0]
            for place in range(LENGTH)
        ]
        for cache in caches
    ]
    assert span.recorded_steps == 1
    for first, second in zip(*found, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


def test_a_session_that_goes_back_is_computed_from_where_it_stands() -> None:
    model = tiny("llama")
    span = Span.load(model.checkpoint, 0, LAYERS)
    text, other = random_tokens(1, LENGTH), random_tokens(1, 4)
    cache = span.new_cache(0, LAYERS, CAPACITY)
    for place in range(LENGTH - 4):
        span.forward_rows([span.row(text[:, place : place + 1], cache, place)])
    for place in range(4):
        span.forward_rows([span.row(other[:, place : place + 1], cache, 9 + place)])
    (logits,) = span.forward_rows([span.row(text[:, 9:10], cache, 9)])

    assert span.recorded_steps == 1 and logits is not None
    torch.testing.assert_close(logits[:, -1], model.expected(text[:, :10])[:, -1], rtol=1e-5, atol=1e-5)


def steps(graphs: Emulation | None = None, clock: Callable[[], float] = standing_clock) -> Steps:
    return Steps(CPU, lambda: [], torch.equal, graphs, clock)


def nothing() -> None:
    """To start over takes nothing."""


def test_a_function_that_does_other_things_later_is_never_run_from_a_recording() -> None:
    calls = 0

    def fickle(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x + calls  # the recording would add the same number for ever

    mine = steps()
    # Other numbers each time: the same again would check nothing.
    inputs = [torch.full((1,), float(number)) for number in range(8)]
    results = [mine.run("kind", fickle, nothing, each).item() for each in inputs]
    assert results == [2 * number + 1 for number in range(8)] and mine.trusted == 0
    assert calls == 8


def test_each_check_starts_over_so_that_nothing_is_done_twice() -> None:
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(0)
        return x

    def function(x: torch.Tensor) -> torch.Tensor:
        return aside(keep, x * 2) + 1

    for mine in (steps(), steps(Emulation())):
        for number in range(8):
            kept.clear()
            assert (
                mine.run("kind", function, kept.clear, torch.full((1,), float(number))).item()
                == 2 * number + 1
            )
            assert kept == [0]
        assert mine.trusted == 1


def test_a_pass_that_fails_while_it_is_watched_is_done_unwatched() -> None:
    watched: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        watched.append(torch._C._len_torch_function_stack() > 0)
        if watched[-1]:
            raise MemoryError
        return -x

    mine = steps()
    for number in range(LEARNING + 2):
        assert mine.run("kind", function, nothing, torch.tensor([number])).item() == -number
    assert watched == [False, True, *[False] * (LEARNING + 1)] and mine.trusted == 0


@pytest.mark.parametrize("graphs", [None, Emulation()])
@pytest.mark.parametrize("good", range(4))
def test_a_recording_that_fails_is_never_run_again(good: int, graphs: Emulation | None) -> None:
    """In a check or long after; what is aside may fail at any step."""
    kept: list[float] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.item())
        return x.clone()

    def function(x: torch.Tensor) -> torch.Tensor:
        return aside(look, x * 2) + 1

    mine = steps(graphs)
    for number in range(2 + good):
        mine.run("kind", function, kept.clear, torch.tensor([float(number)]))
    (course,) = mine._courses.values()
    assert course.step is not None

    def fails(*_: torch.Tensor) -> torch.Tensor:
        kept.append(-1.0)
        raise RuntimeError("out of memory")

    course.step = fails
    for number in range(9, 12):
        kept.clear()
        assert mine.run("kind", function, kept.clear, torch.tensor([float(number)])).item() == 2 * number + 1
        assert kept == [2.0 * number]
    assert mine.trusted == 0


def check_against_another(span: Span, steps: int, before: Callable[[int, Span], None] | None = None) -> None:
    """A session gets the bits that it gets where nothing is recorded. `before` is called before each step."""
    spans = [span, Span.load(tiny("llama").checkpoint, 0, LAYERS)]
    caches = [each.new_cache(0, LAYERS, CAPACITY) for each in spans]
    text = random_tokens(1, steps)
    for place in range(steps):
        spans[1].record_steps(None)  # so that it never comes to its second pass
        found = []
        for each, cache in zip(spans, caches, strict=True):
            if before is not None:
                before(place, each)
            found += each.forward_rows([each.row(text[:, place : place + 1], cache, place)])
        ours, own = found
        assert ours is not None and own is not None and torch.equal(ours, own)


@pytest.mark.parametrize("changes_at", range(1, LEARNING))
def test_a_family_that_changes_its_ways_spoils_no_session(changes_at: int) -> None:
    """Whatever the checks find, the session keeps what the family's own pass made."""

    def change(place: int, span: Span) -> None:
        if place == changes_at:
            part = span._model.get_submodule("model.layers.1.mlp")
            part.register_forward_hook(lambda _, __, output: output * 1.5)

    span = Span.load(tiny("llama").checkpoint, 0, LAYERS)
    check_against_another(span, LEARNING + 1, change)
    assert span.recorded_steps == (changes_at == 1)


def test_graphs_that_compute_nothing_spoil_no_session() -> None:
    class Idle(Emulated):
        def replay(self) -> None:
            """As if it had been captured on another device."""

    span = Span.load(tiny("llama").checkpoint, 0, LAYERS)
    span.record_steps(Emulation(Idle), standing_clock)
    check_against_another(span, LEARNING + 3)
    assert span.recorded_steps == 0


def test_the_least_recently_used_recordings_are_dropped() -> None:
    mine = steps()
    for kind in range(2 * MOST):
        for number in range(LEARNING):
            mine.run(kind, torch.neg, nothing, torch.full((kind + 1,), float(number)))
    assert mine.trusted == MOST


def test_the_same_numbers_again_check_nothing() -> None:
    mine = steps()
    for _ in range(9):
        mine.run("kind", torch.neg, nothing, torch.ones(1))
    assert mine.trusted == 0
    for number in range(CHECKS):
        mine.run("kind", torch.neg, nothing, torch.tensor([5.0 + number]))
    assert mine.trusted == 1


def test_what_cannot_be_captured_is_run_from_its_recording() -> None:
    class Refusing(Emulated):
        def capture(self, function: Callable[[], None]) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    mine = steps(Emulation(Refusing))
    for number in range(LEARNING + 2):
        assert mine.run("kind", torch.neg, nothing, torch.tensor([number])).item() == -number
    assert mine.trusted == 1


@pytest.mark.parametrize("graphs_are_faster", [True, False])
def test_graphs_are_used_where_they_are_faster(graphs_are_faster: bool) -> None:
    now, cost, replays = 0.0, 1.0 if graphs_are_faster else 3.0, 0

    class Costly(Emulated):
        def replay(self) -> None:
            nonlocal now, replays
            now, replays = now + cost, replays + 1
            super().replay()

    def function(x: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 2.0
        return -x

    mine = steps(Emulation(Costly), lambda: now)
    for number in range(LEARNING + 3):
        if number == LEARNING:
            replays = 0
        assert mine.run("kind", function, nothing, torch.tensor([number])).item() == -number
    assert mine.trusted == 1 and replays == (3 if graphs_are_faster else 0)


def test_a_graphed_step_keeps_nothing_of_the_one_before() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return aside(torch.add, x * 2, y) * 3

    _, recording = record(function, [torch.ones(2), torch.ones(2)], [])
    assert isinstance(recording, Recording)
    step = GraphedStep(recording, [torch.ones(2), torch.ones(2)], Emulation())

    first = step(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0]))
    second = step(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))

    assert first.tolist() == [21, 33] and second.tolist() == [3, 9]
