"""A tensor without memory of its own that hears what is done to it, and answers some of it in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as trees


class AnsweringTensor(torch.Tensor):
    """Made by `torch.Tensor._make_wrapper_subclass`. What it has no answer for gets its dense numbers."""

    answers: ClassVar[Mapping[Any, Callable[..., Any]]]
    """By operation; an answer of None says that this case is not one of its own."""

    def dense(self) -> torch.Tensor:
        """The numbers, in this tensor's shape and dtype."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation gives
        if answer := cls.answers.get(func):
            result = answer(*args, **(kwargs or {}))
            if result is not None:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation gives
        args, kwargs = trees.tree_map_only(AnsweringTensor, lambda each: each.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)
