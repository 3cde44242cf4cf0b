"""`python -m peer` as a person meets it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from peer.__main__ import app
from peer.settings import DEMO_MODEL, PeerSettings
from shared.client.session import Drawn, Request, Rerouted
from shared.errors import CorollaError, SettingsError
from shared.identity import Identity
from tests.harness.swarm import Swarm, reference, tokens

ROOT = Path(__file__).parents[2]
PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]
NOWHERE = "http://127.0.0.1:1"
SOON_S = 60.0
"""A process that imports torch on a busy machine needs its time."""


def invoke(*flags: str, **variables: str) -> Result:
    variables.setdefault("HF_HUB_OFFLINE", "1")
    return CliRunner().invoke(app, flags, env={"COLUMNS": "200", "TERM": "dumb", **variables})


def test_help_tells_every_flag() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    flags = [
        "--relay",
        "--model",
        "--layers",
        "--name",
        "--memory",
        "--kv-memory",
        "--max-sessions",
        "--threads",
        "--device",
        "--dtype",
        "--quantize",
        "--identity",
        "--relay-only",
        "--log-level",
    ]
    for flag in flags:
        assert flag in result.output
        assert f"COROLLA_{flag[2:].replace('-', '_').upper()}" in result.output


# ---------------------------------------------------------------- what is taken from where


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PeerSettings, Identity]]:
    """What the command would run with."""
    runs: list[tuple[PeerSettings, Identity]] = []

    async def run(settings: PeerSettings, key: Identity) -> None:
        runs.append((settings, key))

    monkeypatch.setattr("peer.__main__._run", run)
    return runs


FLAGS = {
    "--relay": "http://relay.example:1",
    "--model": "someone/model",
    "--layers": "2/3",
    "--name": "ann",
    "--memory": "9GB",
    "--kv-memory": "2GB",
    "--max-sessions": "7",
    "--threads": "3",
    "--device": "cpu",
    "--dtype": "bfloat16",
    "--quantize": "nf4",
    "--kv-dtype": "int8",
}
READ = PeerSettings(
    relays=("http://relay.example:1",),
    model="someone/model",
    layers="2/3",
    name="ann",
    memory_bytes=9_000_000_000,
    kv_bytes=2_000_000_000,
    max_sessions=7,
    threads=3,
    device="cpu",
    dtype="bfloat16",
    quantize="nf4",
    kv_dtype="int8",
    direct=False,
)


def variable(flag: str) -> str:
    return "COROLLA_" + flag.removeprefix("--").replace("-", "_").upper()


def test_flags_are_read(told: list[tuple[PeerSettings, Identity]]) -> None:
    result = invoke(*(part for pair in FLAGS.items() for part in pair), "--relay-only")
    assert result.exit_code == 0, result.output
    assert told[0][0] == READ


def test_environment_variables_are_read(told: list[tuple[PeerSettings, Identity]]) -> None:
    variables = {variable(flag): value for flag, value in FLAGS.items()}
    result = invoke(COROLLA_RELAY_ONLY="1", **variables)
    assert result.exit_code == 0, result.output
    assert told[0][0] == READ


@pytest.mark.parametrize("flag", list(FLAGS))
def test_a_flag_wins_over_its_variable(flag: str, told: list[tuple[PeerSettings, Identity]]) -> None:
    others = {
        "--memory": "3KB",
        "--kv-memory": "1KB",
        "--max-sessions": "9",
        "--threads": "9",
        "--dtype": "float16",
    }
    others["--kv-dtype"] = "auto"
    both = invoke(flag, FLAGS[flag], **{variable(flag): others.get(flag, "other")})
    alone = invoke(flag, FLAGS[flag])
    assert both.exit_code == alone.exit_code == 0, both.output
    assert told[0][0] == told[1][0]


def test_nothing_is_needed(told: list[tuple[PeerSettings, Identity]]) -> None:
    for _ in range(2):
        assert invoke().exit_code == 0
    assert told[0][0] == PeerSettings(relays=("http://127.0.0.1:8787",), model=DEMO_MODEL)
    assert told[0][1].id != told[1][1].id  # a new identity for each run


def test_an_identity_file_is_made_once_and_kept(
    told: list[tuple[PeerSettings, Identity]], tmp_path: Path
) -> None:
    file = tmp_path / "deep" / "key"
    for _ in range(2):
        assert invoke("--identity", str(file)).exit_code == 0
    assert told[0][1].id == told[1][1].id
    assert file.stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--kv-memory", "lots"], "'lots' is not a size"),
        (["--kv-memory", "9" * 400], "is not a size"),
        (["--dtype", "int8"], "--dtype int8 is unknown: write auto, float32, bfloat16 or float16"),
        (
            ["--quantize", "int3"],
            "--quantize int3 is unknown: write auto, none, fp16, int8, int8-fast, int4 or nf4",
        ),
        (["--device", "cpu", "--quantize", "int8", "--dtype", "bfloat16"], "leave out --dtype bfloat16"),
        (["--device", "toaster"], "--device toaster is not on this machine"),
        (["--device", "cuda:99"], "--device cuda:99 is not on this machine"),
        (["--log-level", "loud"], "--log-level 'loud' is not a level"),
        (["--relay", "ftp://relay"], "not the address of a relay"),
        (["--layers", "9:3"], "--layers 9:3 is outside this model, which has layers 0:"),
        (["--layers", "x"], "--layers 'x' is not a range"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named_in_one_sentence(flags: list[str], sentence: str) -> None:
    result = invoke("--relay", NOWHERE, *flags)
    assert isinstance(result.exception, SettingsError), result.exception
    assert sentence in str(result.exception) and "\n" not in str(result.exception)


@pytest.mark.parametrize("model", ["/nowhere", "no such model", "someone/nothing"])
def test_a_model_that_is_not_there_is_named_in_one_sentence(model: str) -> None:
    result = invoke("--relay", NOWHERE, "--model", model)
    assert isinstance(result.exception, CorollaError), result.exception
    assert model in str(result.exception) and "\n" not in str(result.exception)


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hello")
    result = invoke("--identity", str(tmp_path / "key"))
    assert isinstance(result.exception, SettingsError)
    assert "is not an identity key" in str(result.exception)


@pytest.mark.parametrize(
    "flags", [["--max-sessions", "0"], ["--threads", "0"], ["--threads", "many"], ["--frobnicate"], ["extra"]]
)
def test_what_is_no_flag_or_number_ends_with_status_two(flags: list[str]) -> None:
    result = invoke(*flags)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_errors_are_one_line_on_standard_error_and_the_status_tells_whose_fault(llama: Path) -> None:
    cases = [
        (["--layers", "9:3"], 2, "Error: --layers 9:3 is outside this model, which has layers 0:6\n"),
        ([], 1, f"Error: no relay answers at {NOWHERE}"),
    ]
    running = [
        subprocess.Popen(
            command("--relay", NOWHERE, "--model", str(llama), *flags),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags, *_ in cases
    ]
    for process, (_, status, sentence) in zip(running, cases, strict=True):
        out, err = process.communicate(timeout=SOON_S)
        assert process.returncode == status
        assert out == ""
        assert err.startswith(sentence) and err.count("\n") == 1, err


# ---------------------------------------------------------------- Ctrl-C


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "peer", *flags]


class Running:
    """`python -m peer` as a process of its own, and the swarm that it serves."""

    def __init__(self, swarm: Swarm, process: asyncio.subprocess.Process) -> None:
        self.swarm = swarm
        self.process = process

    def state(self) -> str:
        return next((peer.state for peer in self.swarm.client.directory.live()), "left")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    async def ended(self, timeout_s: float = SOON_S) -> str:
        """What it printed to its end, well."""
        out, err = await asyncio.wait_for(self.process.communicate(), timeout_s)
        assert self.process.returncode == 0, err.decode()
        assert err == b""
        return out.decode()


@asynccontextmanager
async def running(model: Path) -> AsyncIterator[Running]:
    async with Swarm(model) as swarm:
        process = await asyncio.create_subprocess_exec(
            *command("--relay", swarm.relay.url, "--model", str(model), "--name", "ann", "--threads", "1"),
            *("--quantize", "none"),
            cwd=ROOT,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        peer = Running(swarm, process)
        try:
            await swarm.until(lambda: peer.state() == "serving")
            yield peer
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def ask(peer: Running, new: int) -> AsyncGenerator[Drawn | Rerouted, None]:
    artefact = peer.swarm.client.directory.live()[0].artefact
    return peer.swarm.client.generate(Request(artefact=artefact, prompt=PROMPT, max_new_tokens=new))


@pytest.mark.slow
async def test_ctrl_c_lets_a_running_answer_finish(llama: Path) -> None:
    async with running(llama) as peer:
        answer = ask(peer, 150)
        events = [await anext(answer)]

        peer.interrupt()
        await peer.swarm.until(lambda: peer.state() == "draining")
        events += [event async for event in answer]
        out = await peer.ended()

    assert tokens(events) == reference(llama, PROMPT, 150)
    said = out.splitlines()
    assert said[0].startswith(f"serving layers 0–6 of 6 of {llama.name} as ann (")
    assert said[0].endswith("on cpu in float32")
    assert said[-2:] == ["finishing 1 answers; Ctrl-C again leaves at once", "left the swarm"]


@pytest.mark.slow
async def test_ctrl_c_twice_leaves_at_once(llama: Path) -> None:
    async with running(llama) as peer:
        answer = ask(peer, 400)
        await anext(answer)

        peer.interrupt()
        await peer.swarm.until(lambda: peer.state() == "draining")
        peer.interrupt()
        # The answer is not over, since nobody reads on: draining alone would take 20 s.
        out = await peer.ended(timeout_s=15)

        assert out.splitlines()[-1] == "left the swarm"
        await peer.swarm.until(lambda: peer.state() == "left")
        await answer.aclose()
