"""Commands that run beside a test and end with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def started(*commands: Sequence[str], says: str) -> Iterator[None]:
    """Processes that have each printed a line with `says`. They are killed in the end, which is quick."""
    with ExitStack() as stack:
        for process in [stack.enter_context(_process(command)) for command in commands]:
            assert process.stdout is not None
            if not any(says in line for line in process.stdout):
                raise OSError(f"{process.args!r} ended before it said {says!r}")
        yield


@contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module of ours."""
    return [sys.executable, "-m", module, *arguments]
