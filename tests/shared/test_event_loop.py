"""Programs run on uvloop where it is installed, and on asyncio's own loop elsewhere."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from shared import event_loop


async def _loop() -> type[asyncio.AbstractEventLoop]:
    return type(asyncio.get_running_loop())


def test_uvloop_runs_programs_where_it_is_installed() -> None:
    pytest.importorskip("uvloop", reason="uvloop is an extra, and knows no Windows")

    assert event_loop.run(_loop()).__module__.startswith("uvloop")
    assert event_loop.name() == "uvloop"


def test_programs_run_without_uvloop() -> None:
    program = (
        "import asyncio, sys; sys.modules['uvloop'] = None;"
        "from shared import event_loop;"
        "event_loop.run(asyncio.sleep(0)); print(event_loop.name())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == "asyncio"


def test_what_ends_a_program_is_told() -> None:
    async def fail() -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        event_loop.run(fail())
