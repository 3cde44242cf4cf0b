"""`python -m web` as a person meets it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.errors import SettingsError
from web.__main__ import app, read_keys

ROOT = Path(__file__).parents[2]


def test_help_tells_every_flag() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    for flag in (
        "--relay",
        "--host",
        "--port",
        "--allow-host",
        "--api-key",
        "--api-key-file",
        "--cors-origin",
        "--identity",
        "--demo",
        "--peers",
        "--log-level",
    ):
        assert flag in result.output


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--host", "0.0.0.0"], "--allow-host"),
        (["--log-level", "loud"], "--log-level"),
        (["--relay", "ftp://relay"], "not the address of a relay"),
        (["--api-key-file", "/nowhere"], "cannot be read"),
        (["--api-key-file", os.devnull], "holds no key"),
        (["--cors-origin", "chat.example"], "is no origin"),
        (["--cors-origin", "https://chat.example/page"], "is no origin"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named(flags: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, flags)
    assert isinstance(result.exception, SettingsError)
    assert sentence in str(result.exception)


def test_keys_stand_in_a_file_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("rose # for Kim\n\n# nobody\n lily \n")
    assert read_keys(path) == ["rose", "lily"]


def test_a_relay_that_does_not_answer_is_one_sentence() -> None:
    command = [sys.executable, "-m", "web", "--port", "0", "--relay", "http://127.0.0.1:1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: no relay answers at http://127.0.0.1:1")
    assert "Traceback" not in result.stderr


def test_the_gateway_is_up_before_transformers_and_never_loads_torch_itself() -> None:
    code = (
        "import sys, web.__main__; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.slow
def test_the_demo_survives_a_peer_and_leaves_nobody_behind() -> None:
    command = [sys.executable, "-m", "web", "--demo", "--peers", "2", "--port", "0"]
    demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("╰"):
                break
        children = children_of(demo.pid)
        assert len(children) == 3
        os.kill(max(children), signal.SIGKILL)
        assert "was ended by signal 9; the demo goes on" in demo.stdout.readline()
        demo.send_signal(signal.SIGTERM)
        demo.communicate(timeout=20)
        assert demo.returncode == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        demo.kill()


def children_of(parent: int) -> list[int]:
    """From Linux's own listing, since a bare machine has no ps."""
    children: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = re.search(r"^PPid:\s+(\d+)$", (process / "status").read_text(), re.MULTILINE)
            if found and int(found[1]) == parent:
                children.append(int(process.name))
    return children
