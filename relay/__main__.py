"""`python -m relay`: start a meeting point for peers and gateways."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from relay.app import Relay
from relay.settings import RelaySettings
from shared import event_loop
from shared.logs import configure_logs
from shared.settings import LogLevelOption, data_directory, run_command

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def _variables(name: str) -> list[str]:
    """The first that is set counts: one environment may serve several commands of the same machine."""
    return [f"COROLLA_RELAY_{name}", f"COROLLA_{name}"]


@app.command()
def relay(
    host: Annotated[
        str,
        typer.Option(
            show_envvar=False,
            envvar=_variables("HOST"),
            help="Address to listen on; 0.0.0.0 lets other machines in.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            show_envvar=False,
            envvar=_variables("PORT"),
            min=0,
            max=65535,
            help="TCP port; 0 takes a free one.",
        ),
    ] = 8787,
    name: Annotated[
        list[str] | None,
        typer.Option(
            show_envvar=False,
            envvar=_variables("NAMES"),
            metavar="HOSTNAME",
            help="Host name that others dial, such as relay.example.org. May be given several times.",
        ),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            show_envvar=False,
            envvar=_variables("ORIGINS"),
            metavar="ORIGIN",
            help="Web origin whose pages may connect, such as https://chat.example.org.",
        ),
    ] = None,
    stun: Annotated[
        bool,
        typer.Option(
            show_envvar=False, envvar=_variables("STUN"), help="Answer STUN, so peers can find direct paths."
        ),
    ] = True,
    stun_port: Annotated[
        int | None,
        typer.Option(
            show_envvar=False,
            envvar=_variables("STUN_PORT"),
            min=0,
            max=65535,
            help="UDP port for STUN; 0 takes a free one.",
            show_default="same number as --port",
        ),
    ] = None,
    database: Annotated[
        Path | None,
        typer.Option(
            show_envvar=False,
            envvar=_variables("DATABASE"),
            dir_okay=False,
            help="SQLite file that keeps the map of layers over a restart.",
            show_default="relay.sqlite in the data directory",
        ),
    ] = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Start a relay: the place where peers and gateways meet.

    It knows who serves which layers and passes sealed messages between machines that have no direct path.
    It needs no GPU and sees no prompts.

    Every option can also be set in the environment, --stun-port by COROLLA_RELAY_STUN_PORT and so on.
    """
    configure_logs(log_level)
    settings = RelaySettings(
        host=host,
        port=port,
        names=tuple(name or ()),
        origins=tuple(origin or ()),
        stun=stun,
        stun_port=stun_port,
        database=database or data_directory() / "relay.sqlite",
    )
    _allow_many_connections()
    with contextlib.suppress(KeyboardInterrupt):
        event_loop.run(_run(settings))


async def _run(settings: RelaySettings) -> None:
    stopped = asyncio.Event()
    _on_stop_signals(stopped)
    async with Relay(settings) as running:
        stun = f", STUN on UDP {running.stun_port}" if running.stun_port else ""
        Console(soft_wrap=True).print(f"Relay at {running.url}{stun}", markup=False, highlight=False)
        await stopped.wait()


def _on_stop_signals(stopped: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows has no handlers in its event loop; there Ctrl-C arrives as KeyboardInterrupt.
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stopped.set)


def _allow_many_connections() -> None:
    """Each participant is an open file; the usual limit of 1024 is meant for programs that have few."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS refuses some values below its stated maximum; then the limit stays as it was.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    run_command(app)
