"""Commands that run beside a test and end with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
END_S = 10


@contextmanager
def started(command: Sequence[str], says: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed a line with `says`; it is ended with the block, kindly first."""
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if says in line:
                break
        else:
            raise OSError(f"`{' '.join(command)}` ended before it said {says!r}")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module of ours."""
    return [sys.executable, "-m", module, *arguments]
