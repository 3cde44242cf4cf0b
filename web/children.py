"""Processes of the demo: started, watched and ended together, whatever happens to us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.background import Background

STOP_S = 5.0
"""How long a process may take to end when asked to; then it is killed."""
LAST_WORDS = 200


class Child:
    """One process, and the file that its output goes to."""

    def __init__(self, name: str, process: Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def obituary(self) -> str:
        """How it ended, in one sentence."""
        code = self.process.returncode or 0
        if code < 0:
            return f"{self.name} was ended by signal {-code}"
        words = self._last_words()
        return f"{self.name} stopped with code {code}" + (f", its last words: {words}" if words else "")

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:LAST_WORDS] if lines else ""


class Children:
    """async with Children(folder, on_end) as children: await children.start("ann", [...])

    `on_end` hears of every process that ends before it is asked to. Leaving ends all of them.
    """

    def __init__(self, folder: Path, on_end: Callable[[Child], None]) -> None:
        self._folder = folder
        self._on_end = on_end
        self._children: list[Child] = []
        self._stopping = False
        self._watching = Background()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        try:
            await self._ask_to_stop()
        finally:
            for child in self._children:
                if child.running:
                    child.process.kill()
            await asyncio.gather(*(child.process.wait() for child in self._children))
            await self._watching.__aexit__(kind, error, trace)

    async def start(self, name: str, command: Sequence[str]) -> Child:
        """Its output goes to a file, its input stays open and empty while we live.

        It hears no Ctrl-C, since we tell it when to stop.
        """
        return await self._start(name, command, wait_for_line=False)

    async def start_and_hear(self, name: str, command: Sequence[str]) -> tuple[Child, str]:
        """As `start`, and waits for the first line that it writes; an empty one when it ended without."""
        child = await self._start(name, command, wait_for_line=True)
        output = child.process.stdout
        assert output is not None
        line = await output.readline()
        self._watching.start(_pour(output, child.log))
        return child, line.decode(errors="replace")

    async def _start(self, name: str, command: Sequence[str], *, wait_for_line: bool) -> Child:
        log = self._folder / f"{name}.log"
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE,
                stdout=PIPE if wait_for_line else file,
                stderr=file if wait_for_line else STDOUT,
                env=self._environment(name),
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        self._watching.start(self._watch(child))
        return child

    async def _watch(self, child: Child) -> None:
        await child.process.wait()
        if not self._stopping:
            self._on_end(child)

    async def _ask_to_stop(self) -> None:
        for child in self._children:
            # On Windows there is no asking; terminate() ends the process there.
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(child.process.wait() for child in self._children))

    def _environment(self, name: str) -> dict[str, str]:
        """Ours, without settings that were meant for us; and a home of its own."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith("COROLLA_")}
        return {**ours, "COROLLA_HOME": str(self._folder / name), "PYTHONUNBUFFERED": "1"}


def room_command(room: str, *arguments: str) -> list[str]:
    """The command line of a room, as people type it, that also ends when we do."""
    return [sys.executable, "-m", "web.tethered", room, *arguments]


async def _pour(output: asyncio.StreamReader, log: Path) -> None:
    """What comes after the first line goes to the log, or the pipe would fill up and stop its writer."""
    with log.open("ab") as file:
        while data := await output.read(65536):
            file.write(data)
            file.flush()
