"""What a forward pass tells torch to do, written down, to be done again without the family's own Python.

From one token of a session to the next nothing changes but the numbers: the same products of the same
weights in the same order. `record` lets a pass run as always and writes down each call of torch;
`Recording.run` makes the calls again, to the bit the same, for other inputs of the same shapes. A pass that
looks at its numbers to decide what to do next, or gets numbers from where they cannot be seen coming, is not
recorded.

Some of a pass must not be written down, because it differs from step to step: `aside` runs such a function as
a call of its own, whatever torch is told inside.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")
Registers = list[Any]
"""The values of a running recording, each at its number; None before it is made and after its last use."""

MERE_FACTS = {
    "__get__",
    "__len__",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "ndimension",
    "numel",
    "size",
    "storage_offset",
    "stride",
}
"""What tells of a tensor's shape, dtype and place: the same in each step. `__get__` is all its properties."""

BY_NUMBERS = {"argwhere", "bincount", "masked_select", "nonzero", "unique", "unique_consecutive"}
"""What gives as many results as its numbers say."""

SIZED = {"expand", "narrow", "new_empty", "new_full", "new_ones", "new_zeros", "repeat", "reshape", "split"}
SIZED |= {"tensor_split", "tile", "view"}
"""What gives as many results as its other arguments say, which may be numbers of tensors."""

CREATED = {"arange", "empty", "full", "linspace", "ones", "zeros"}
"""What gives as many results as any of its arguments says."""

OFTEN_NOTHING = {"contiguous", "float", "to", "type_as"}
"""What gives back its own input when that is as wanted already; then there is nothing to do again either."""


class Unrecordable(Exception):
    """A pass that cannot be done again by what it told torch to do."""


@dataclass(frozen=True)
class Call:
    """One line of a recording, as Python source: `r` are the registers and `k` the constants."""

    source: str
    reads: tuple[int, ...]
    aside: bool = False


class Recording:
    """The calls of one pass, from its inputs to its result."""

    def __init__(self, calls: Sequence[Call], constants: Sequence[Any], registers: int, result: int) -> None:
        self.calls = calls
        self._constants = constants
        self._registers = registers
        self._result = result
        last = {register: place for place, call in enumerate(calls) for register in call.reads}
        self._done_with: dict[int, list[int]] = {}
        for register, place in last.items():
            if register != result:
                self._done_with.setdefault(place, []).append(register)
        self._whole = self._compiled(range(len(calls)))

    def run(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Do it all again, for other inputs."""
        registers = self.registers(inputs)
        self._whole(registers)
        return self.result(registers)

    def registers(self, inputs: Sequence[torch.Tensor]) -> Registers:
        """As they are before the first call."""
        return [*inputs, *([None] * (self._registers - len(inputs)))]

    def result(self, registers: Registers) -> torch.Tensor:
        """What the last call has left."""
        result: torch.Tensor = registers[self._result]
        return result

    def pieces(self) -> Iterator[tuple[bool, Callable[[Registers], None]]]:
        """The same in pieces that follow one another; with each, whether it is a call of `aside` alone."""
        groups = itertools.groupby(
            enumerate(self.calls), lambda pair: (pair[1].aside and pair[0], pair[1].aside)
        )
        for (_, aside), group in groups:
            yield aside, self._compiled([place for place, _ in group])

    def _compiled(self, places: Iterable[int]) -> Callable[[Registers], None]:
        """One Python function of many calls: torch is called 650 times for a token of twelve layers."""
        lines = ["def run(r):", "    pass"]
        for place in places:
            lines.append(f"    {self.calls[place].source}")
            lines += [f"    r[{register}] = None" for register in self._done_with.get(place, ())]
        names: dict[str, Any] = {f"k{number}": value for number, value in enumerate(self._constants)}
        # Made of numbers and of names that were counted here: no word in it comes from a model or a message.
        exec(compile("\n".join(lines), "<recorded pass>", "exec"), names)
        compiled: Callable[[Registers], None] = names["run"]
        return compiled


def record(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], constants: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, Recording | Unrecordable]:
    """Call `function(*inputs)`; give its result, and the recording or why there is none.

    `constants` are the tensors that it may use without having made them: those of the model.
    """
    recorder = Recorder(inputs, constants)
    _ACTIVE.recorder = recorder
    try:
        with recorder:
            result = function(*inputs)
    finally:
        del _ACTIVE.recorder
    return result, recorder.recording(result)


def aside(function: Callable[..., Result], *arguments: Any) -> Result:  # noqa: ANN401
    """Call `function(*arguments)`, which gives one tensor; in a recording, as one call."""
    recorder: Recorder | None = getattr(_ACTIVE, "recorder", None)
    return function(*arguments) if recorder is None else recorder.aside(function, arguments)


class Recorder(TorchFunctionMode):
    """While it is entered, every call of torch in this thread is done and written down."""

    def __init__(self, inputs: Sequence[torch.Tensor], constants: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._calls: list[Call] = []
        self._constants: list[Any] = []
        self._numbers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        """The registers of tensors by their ids, which go to others when they are gone."""
        self._registers = 0
        for value in inputs:
            self._place(value)
        self._known = {id(tensor) for tensor in constants}
        self._refusal: str | None = None
        self._paused = False

    def recording(self, result: torch.Tensor) -> Recording | Unrecordable:
        """What was written down, if it leads to `result`."""
        number = self._number(result)
        if self._refusal is not None or number is None:
            return Unrecordable(self._refusal or "its result was made where it could not be seen")
        return Recording(self._calls, self._constants, self._registers, number)

    def aside(self, function: Callable[..., Result], arguments: Sequence[Any]) -> Result:
        """Do as one call what must not be written down in its parts."""
        self._paused = True
        try:
            result = function(*arguments)
        finally:
            self._paused = False
        if self._refusal is None:
            self._note(function, arguments, {}, result, aside=True)
        return result

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the call gives
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused and self._refusal is None:
            self._hear(func, args, kwargs, result)
        return result

    def _hear(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,  # noqa: ANN401
    ) -> None:
        name, *_ = getattr(func, "__name__", str(func)).split(".")
        if _depends_on_numbers(name, args, kwargs):
            self._refusal = f"{name} gives as many results as its numbers say"
        elif any(True for _ in _tensors(result)):
            if not (name in OFTEN_NOTHING and args and result is args[0]):
                self._note(func, args, kwargs, result)
        elif not any(True for _ in _tensors((args, kwargs))):
            return  # what concerns no tensor: whether gradients are wanted, say
        elif result is None:
            self._note(func, args, kwargs, result)
        elif name not in MERE_FACTS:
            self._refusal = f"it looks at its numbers ({name})"

    def _note(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,  # noqa: ANN401
        *,
        aside: bool = False,
    ) -> None:
        reads: list[int] = []
        said = [self._said(arg, reads) for arg in args]
        said += [f"{name}={self._said(arg, reads)}" for name, arg in kwargs.items()]
        call = f"{self._constant(func)}({', '.join(said)})"
        source = call if result is None else f"{self._place(result)} = {call}"
        self._calls.append(Call(source, tuple(dict.fromkeys(reads)), aside))

    def _said(self, value: Any, reads: list[int]) -> str:  # noqa: ANN401
        """An argument as source. Tensors that are made on the way are read from their registers."""
        if isinstance(value, torch.Tensor):
            number = self._number(value)
            if number is None:
                if id(value) not in self._known:
                    self._refusal = "it uses numbers that were made where it could not be seen"
                return self._constant(value)
            reads.append(number)
            return f"r[{number}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._said(each, reads)}, ' for each in value)})"
        if isinstance(value, list):
            return f"[{', '.join(self._said(each, reads) for each in value)}]"
        if isinstance(value, dict):
            entries = (f"{self._constant(key)}: {self._said(each, reads)}" for key, each in value.items())
            return f"{{{', '.join(entries)}}}"
        if isinstance(value, slice):
            ends = (self._said(each, reads) for each in (value.start, value.stop, value.step))
            return f"slice({', '.join(ends)})"
        return repr(value) if value is None or type(value) in (bool, int) else self._constant(value)

    def _constant(self, value: Any) -> str:  # noqa: ANN401
        self._constants.append(value)
        return f"k{len(self._constants) - 1}"

    def _number(self, value: torch.Tensor) -> int | None:
        """Its register, if it was made on the way."""
        tensor, number = self._numbers.get(id(value), (lambda: None, None))
        return number if tensor() is value else None

    def _place(self, result: Any) -> str:  # noqa: ANN401
        """Where a result goes, as source."""
        if isinstance(result, torch.Tensor):
            known = self._number(result)
            if known is not None:
                return f"r[{known}]"  # a tensor that was changed in place
            self._numbers[id(result)] = weakref.ref(result), self._registers
            self._registers += 1
            return f"r[{self._registers - 1}]"
        if isinstance(result, tuple | list):
            return f"({''.join(f'{self._place(each)}, ' for each in result)})"
        return "_"


_ACTIVE = threading.local()


def _tensors(value: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401
    """All in a nest of tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, slice):
        yield from _tensors((value.start, value.stop, value.step))


def _depends_on_numbers(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the shape of what a call gives is by its inputs' numbers, not by their shapes."""
    others = list(_tensors((args[1:], kwargs)))
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name in ("__getitem__", "index"):
        chosen = args[1] if len(args) > 1 else None
        parts = chosen if isinstance(chosen, tuple) else [chosen]
        ends = [end for part in parts if isinstance(part, slice) for end in _tensors(part)]
        return bool(ends) or any(index.dtype in (torch.bool, torch.uint8) for index in others)
    if name == "one_hot":
        return bool(kwargs.get("num_classes", args[1] if len(args) > 1 else -1) < 0)
    if name == "repeat_interleave":
        return bool(others) or len(args) + len(kwargs) == 1
    if name in CREATED:
        return any(True for _ in _tensors((args, kwargs)))
    return name in BY_NUMBERS or (name in SIZED and bool(others))
