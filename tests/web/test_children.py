"""Processes of the demo are watched, and none outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from web import children as module
from web.children import Child, Children

FOREVER = "import time; print('ready', flush=True); time.sleep(1000)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def running(*children: Child) -> int:
    return sum(child.running for child in children)


class Ends:
    """Hears of processes that ended on their own."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.happened = asyncio.Event()

    def __call__(self, child: Child) -> None:
        self.children.append(child)
        self.happened.set()


@pytest.fixture
async def ends() -> Ends:
    return Ends()


async def test_leaving_ends_every_process(tmp_path: Path, ends: Ends) -> None:
    async with Children(tmp_path, ends) as children:
        ann, line = await children.start_and_hear("ann", python(FOREVER))
        bob = await children.start("bob", python(FOREVER))
        assert line == "ready\n"
        assert running(ann, bob) == 2
    assert running(ann, bob) == 0
    assert ends.children == []


async def test_a_failure_of_ours_ends_every_process(tmp_path: Path, ends: Ends) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Children(tmp_path, ends) as children:
            ann = await children.start("ann", python(FOREVER))
            raise ZeroDivisionError
    assert not ann.running


async def test_being_cancelled_ends_every_process(tmp_path: Path, ends: Ends) -> None:
    started = asyncio.Event()
    ann: list[Child] = []

    async def run() -> None:
        async with Children(tmp_path, ends) as children:
            ann.append((await children.start_and_hear("ann", python(FOREVER)))[0])
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await asyncio.wait_for(started.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ann[0].running


async def test_a_process_that_does_not_listen_is_killed(
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_S", 0.1)
    async with Children(tmp_path, ends) as children:
        ann, _ = await children.start_and_hear("ann", python(STUBBORN))
    assert ann.process.returncode == -signal.SIGKILL


async def test_an_end_of_its_own_is_told_in_one_sentence(tmp_path: Path, ends: Ends) -> None:
    async with Children(tmp_path, ends) as children:
        await children.start(
            "ann", python("import sys; print('Error: no room', file=sys.stderr); sys.exit(3)")
        )
        await asyncio.wait_for(ends.happened.wait(), 10)
        assert ends.children[0].obituary() == "ann stopped with code 3, its last words: Error: no room"


async def test_a_kill_is_told_in_one_sentence(tmp_path: Path, ends: Ends) -> None:
    async with Children(tmp_path, ends) as children:
        ann = await children.start("ann", python("import time; time.sleep(1000)"))
        os.kill(ann.process.pid, signal.SIGKILL)
        await asyncio.wait_for(ends.happened.wait(), 10)
        assert ends.children[0].obituary() == "ann was ended by signal 9"


async def test_a_process_that_ends_before_its_first_line_is_not_waited_for(
    tmp_path: Path, ends: Ends
) -> None:
    async with Children(tmp_path, ends) as children:
        _, line = await children.start_and_hear("relay", python("pass"))
        assert line == ""


async def test_a_process_may_write_much(tmp_path: Path, ends: Ends) -> None:
    """A pipe that nobody reads holds 64 KiB; its writer would wait for ever."""
    async with Children(tmp_path, ends) as children:
        relay, _ = await children.start_and_hear("relay", python("print('x' * 99, flush=True)\n" * 3000))
        await asyncio.wait_for(relay.process.wait(), 20)
        assert relay.process.returncode == 0


async def test_processes_do_not_inherit_our_settings(
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COROLLA_LAYERS", "0:1")
    code = "import os; print([os.environ.get(f'COROLLA_{name}') for name in ('LAYERS', 'HOME')])"
    async with Children(tmp_path, ends) as children:
        _, line = await children.start_and_hear("ann", python(code))
    assert line.strip() == str([None, str(tmp_path / "ann")])


async def test_a_tethered_process_ends_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    """`-m web.tethered` runs a command as it is, and ends it when its standard input closes."""
    (tmp_path / "petal.py").write_text(f"import sys; print(sys.argv[1:], __name__)\n{FOREVER}")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "web.tethered", "petal", "--open"),
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
    )
    assert process.stdout is not None and process.stdin is not None
    assert await process.stdout.readline() == b"['--open'] __main__\n"
    process.stdin.close()
    assert await asyncio.wait_for(process.wait(), 10) == -signal.SIGTERM
