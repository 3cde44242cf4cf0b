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
from relay.garbage import collect_seldom
from relay.settings import UNLIMITED, Rate, RelaySettings
from shared import event_loop
from shared.background import Background
from shared.logs import configure_logs
from shared.settings import LogLevelOption, data_directory, parse_bytes, run_command

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

DEFAULTS = RelaySettings()
LIMITS = "Limits"
# How much of a rate may come at once: a prompt for bytes; a household that comes back for all else.
BYTES_BURST_S = 4
EVENTS_BURST_S = 20


def _rate(per_s: float, burst_s: float) -> Rate:
    return Rate(per_s, per_s * burst_s) if per_s else UNLIMITED


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
    second_stun_port: Annotated[
        int | None,
        typer.Option(
            show_envvar=False,
            envvar=_variables("SECOND_STUN_PORT"),
            min=0,
            max=65535,
            help="UDP port for STUN by which peers tell what their routers do; 0 takes a free one.",
            show_default="the number after --stun-port",
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
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            show_envvar=False,
            envvar=_variables("PROXIES"),
            metavar="ADDRESS",
            help="Reverse proxy on another machine, whose X-Forwarded-For is believed.",
        ),
    ] = None,
    max_participants: Annotated[
        int,
        typer.Option(
            show_envvar=False,
            envvar=_variables("MAX_PARTICIPANTS"),
            min=1,
            rich_help_panel=LIMITS,
            help="Peers and gateways connected at once; each takes some 25 KiB.",
        ),
    ] = DEFAULTS.max_participants,
    address_connections: Annotated[
        int,
        typer.Option(
            show_envvar=False,
            envvar=_variables("ADDRESS_CONNECTIONS"),
            min=1,
            rich_help_panel=LIMITS,
            help="Connections that one address may hold.",
        ),
    ] = DEFAULTS.address_connections,
    address_new_connections: Annotated[
        float,
        typer.Option(
            show_envvar=False,
            envvar=_variables("ADDRESS_NEW_CONNECTIONS"),
            min=0,
            rich_help_panel=LIMITS,
            help="Connections per second that one address may open; 0 sets no limit.",
        ),
    ] = DEFAULTS.address_new_connections.per_s,
    participant_bytes: Annotated[
        str,
        typer.Option(
            show_envvar=False,
            envvar=_variables("PARTICIPANT_BYTES"),
            metavar="SIZE",
            rich_help_panel=LIMITS,
            help="Forwarded per second for one participant, such as 8MB; 0 sets no limit.",
        ),
    ] = "8MB",
    address_bytes: Annotated[
        str,
        typer.Option(
            show_envvar=False,
            envvar=_variables("ADDRESS_BYTES"),
            metavar="SIZE",
            rich_help_panel=LIMITS,
            help="Forwarded per second for all participants of one address; 0 sets no limit.",
        ),
    ] = "16MB",
    participant_announcements: Annotated[
        float,
        typer.Option(
            show_envvar=False,
            envvar=_variables("PARTICIPANT_ANNOUNCEMENTS"),
            min=0,
            rich_help_panel=LIMITS,
            help="Announcements per second of one participant; 0 sets no limit.",
        ),
    ] = DEFAULTS.participant_announcements.per_s,
    address_announcements: Annotated[
        float,
        typer.Option(
            show_envvar=False,
            envvar=_variables("ADDRESS_ANNOUNCEMENTS"),
            min=0,
            rich_help_panel=LIMITS,
            help="Announcements per second of all participants of one address; 0 sets no limit.",
        ),
    ] = DEFAULTS.address_announcements.per_s,
    idle: Annotated[
        float,
        typer.Option(
            show_envvar=False,
            envvar=_variables("IDLE"),
            min=0,
            metavar="SECONDS",
            rich_help_panel=LIMITS,
            help="Who says nothing for so long, announces and watches nothing must go; 0 lets it stay.",
        ),
    ] = DEFAULTS.idle_s,
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
        second_stun_port=second_stun_port,
        database=database or data_directory() / "relay.sqlite",
        proxies=(*DEFAULTS.proxies, *(proxy or ())),
        max_participants=max_participants,
        address_connections=address_connections,
        address_new_connections=_rate(address_new_connections, EVENTS_BURST_S),
        participant_bytes=_rate(parse_bytes(participant_bytes), BYTES_BURST_S),
        address_bytes=_rate(parse_bytes(address_bytes), BYTES_BURST_S),
        participant_announcements=_rate(participant_announcements, EVENTS_BURST_S),
        address_announcements=_rate(address_announcements, EVENTS_BURST_S),
        idle_s=idle,
    )
    _allow_many_connections()
    with contextlib.suppress(KeyboardInterrupt):
        event_loop.run(_run(settings))


async def _run(settings: RelaySettings) -> None:
    stopped = asyncio.Event()
    _on_stop_signals(stopped)
    async with Relay(settings) as running, Background() as tasks:
        stun = f", STUN on UDP {running.stun_port}" if running.stun_port else ""
        Console(soft_wrap=True).print(f"Relay at {running.url}{stun}", markup=False, highlight=False)
        tasks.start(collect_seldom(running.meeting))
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
