"""`python -m relay`, as a person starts and stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

import relay.__main__
from relay.__main__ import app
from relay.settings import UNLIMITED, RelaySettings
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
        "--second-stun-port",
        "--database",
        "--proxy",
        "--max-participants",
        "--address-connections",
        "--address-new-connections",
        "--participant-bytes",
        "--address-bytes",
        "--participant-announcements",
        "--address-announcements",
        "--idle",
        "--log-level",
    ):
        assert flag in text


def test_limits_come_from_flags_and_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[RelaySettings] = []

    async def remember(settings: RelaySettings) -> None:
        told.append(settings)

    monkeypatch.setattr(relay.__main__, "_run", remember)
    flags = ["--participant-bytes", "500KB", "--address-announcements", "0", "--proxy", "10.0.0.9"]
    environment = {"COROLLA_RELAY_ADDRESS_CONNECTIONS": "7", "COROLLA_ADDRESS_NEW_CONNECTIONS": "2"}
    assert CliRunner().invoke(app, flags, env=environment).exit_code == 0
    assert CliRunner().invoke(app, []).exit_code == 0

    given, default = told
    assert given.participant_bytes.per_s == 500_000 and given.address_announcements == UNLIMITED
    assert given.address_connections == 7 and given.address_new_connections.per_s == 2
    assert given.proxies == ("127.0.0.1", "::1", "10.0.0.9")
    assert msgspec.structs.replace(default, database=None) == RelaySettings()


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
