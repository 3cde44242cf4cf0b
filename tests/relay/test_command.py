"""`python -m relay`, as a person starts and stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relay.__main__ import app
from shared.errors import ConnectionLost, SettingsError
from shared.settings import data_directory, run_command


@contextmanager
def started(home: Path, *flags: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", *flags],
        env={**os.environ, "COROLLA_HOME": str(home), "NO_COLOR": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_its_address_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, COROLLA_RELAY_PORT="0") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Relay at http://127.0.0.1:")
        process.send_signal(number)
        out, err = process.communicate(timeout=10)

    assert process.returncode == 0 and "Traceback" not in out + err
    assert (tmp_path / "relay.sqlite").exists()


def test_a_wrong_setting_is_one_sentence_and_status_two(tmp_path: Path) -> None:
    with started(tmp_path, "--port", "0", "--host", "203.0.113.77") as process:
        out, err = process.communicate(timeout=10)

    assert process.returncode == 2 and out == ""
    assert err.startswith("Error: cannot answer STUN on UDP 203.0.113.77:0:") and err.count("\n") == 1


def test_help_names_every_option() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for flag in (
        "--host",
        "--port",
        "--name",
        "--origin",
        "--stun",
        "--stun-port",
        "--database",
        "--log-level",
    ):
        assert flag in text


@pytest.mark.parametrize(("error", "status"), [(ConnectionLost("gone"), 1), (SettingsError("wrong"), 2)])
def test_an_error_of_ours_ends_a_command_with_its_sentence(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    command = typer.Typer(add_completion=False)

    @command.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["corolla"])
    with pytest.raises(SystemExit) as ending:
        run_command(command)
    assert ending.value.code == status
    assert capsys.readouterr().err.strip() == f"Error: {error}"


def test_the_data_directory_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COROLLA_HOME", "/somewhere/else")
    assert data_directory() == Path("/somewhere/else")
    monkeypatch.delenv("COROLLA_HOME")
    assert data_directory().name == "corolla"
