"""`python -m web`: open the page and the API to a swarm; with `--demo`, bring the swarm along."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from yarl import URL

from shared import event_loop
from shared.background import Background
from shared.channel.addresses import Listen, parse_listen
from shared.client.swarm_client import SwarmClient
from shared.errors import SettingsError
from shared.identity import Identity
from shared.logs import configure_logs
from shared.settings import (
    AdvertiseOption,
    ListenOption,
    LogLevelOption,
    RelayOption,
    data_directory,
    relay_urls,
    run_command,
)
from web.app import Gateway, GatewaySettings, check_exposure
from web.demo import NAMES, demo
from web.tokenizer import preload

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def web(
    relay: RelayOption = None,
    host: Annotated[
        str,
        typer.Option(envvar="COROLLA_WEB_HOST", help="Address to listen on; 0.0.0.0 lets other machines in."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="COROLLA_WEB_PORT", min=0, max=65535, help="TCP port; 0 takes a free one.")
    ] = 8080,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            envvar="COROLLA_WEB_ALLOW_HOST",
            metavar="HOSTNAME",
            help="Name that others reach this page by, such as chat.example.org. May be given several times.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="COROLLA_WEB_API_KEY",
            metavar="KEY",
            help="Answer only those who bring this key. May be given several times.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="COROLLA_WEB_API_KEY_FILE",
            metavar="FILE",
            help="The same for the keys in a file, one a line; # begins a comment.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="COROLLA_WEB_CORS_ORIGIN",
            metavar="ORIGIN",
            help="Web page that may use the API, such as https://chat.example.org. "
            "May be given several times.",
        ),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(
            envvar="COROLLA_IDENTITY",
            metavar="FILE",
            help="This gateway's key; made on first use.",
            show_default="a new one for this run",
        ),
    ] = None,
    relay_only: Annotated[
        bool,
        typer.Option(
            "--relay-only/--direct", envvar="COROLLA_RELAY_ONLY", help="Open no direct paths to peers."
        ),
    ] = False,
    listen: ListenOption = "off",
    advertise: AdvertiseOption = None,
    with_demo: Annotated[
        bool, typer.Option("--demo", help="Start a relay and peers on this machine too, with a tiny model.")
    ] = False,
    peers: Annotated[
        int, typer.Option(min=1, max=len(NAMES), help="With --demo: how many peers share the model.")
    ] = 3,
    log_level: LogLevelOption = "warning",
) -> None:
    """Chat with a swarm: a page for people, and an OpenAI-compatible API for programs.

    It needs no GPU and loads no weights. Each option can also be set by its environment variable.
    """
    configure_logs(log_level)
    settings = GatewaySettings(
        host=host,
        port=port,
        allowed_hosts=tuple(allow_host or ()),
        data_dir=data_directory(),
        cors_origins=tuple(_origin(text) for text in cors_origin or ()),
        api_keys=(*(api_key or ()), *read_keys(api_key_file)),
    )
    check_exposure(settings.host, settings.allowed_hosts)
    console = Console(soft_wrap=True)
    opened: AbstractAsyncContextManager[Gateway]
    if with_demo:
        opened = demo(settings, peers, console, direct=not relay_only, log_level=log_level)
    else:
        key = Identity.load(identity) if identity is not None else Identity.generate()
        opened = _gateway(
            settings,
            relay_urls(relay),
            key,
            direct=not relay_only,
            listen=parse_listen(listen, advertise or ()),
        )
    with suppress(KeyboardInterrupt):
        event_loop.run(_until_signalled(_serve(opened, console)))


def read_keys(path: Path | None) -> list[str]:
    """Raises SettingsError for a file that cannot be read or holds none: then anyone could ask."""
    if path is None:
        return []
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--api-key-file {path} cannot be read: {error}") from None
    keys = [line for line in lines if line]
    if not keys:
        raise SettingsError(f"--api-key-file {path} holds no key; put one on a line of its own")
    return keys


def _origin(text: str) -> str:
    """Raises SettingsError for what no browser would send as an Origin."""
    try:
        url = URL(text)
        if url.scheme in ("http", "https") and url.host and str(url.origin()) == text.rstrip("/").lower():
            return str(url.origin())
    except ValueError:
        pass
    raise SettingsError(
        f"--cors-origin {text} is no origin; give scheme and host alone, as in https://chat.example.org"
    )


@asynccontextmanager
async def _gateway(
    settings: GatewaySettings,
    relays: Sequence[str],
    key: Identity,
    *,
    direct: bool,
    listen: Listen | None,
) -> AsyncGenerator[Gateway, None]:
    async with (
        SwarmClient(key, relays, direct=direct, listen=listen) as swarm,
        Gateway(settings, swarm) as gateway,
    ):
        yield gateway


async def _serve(opened: AbstractAsyncContextManager[Gateway], console: Console) -> None:
    async with Background() as tasks:
        tasks.start(asyncio.to_thread(preload))
        async with opened as gateway:
            console.print(_invitation(gateway.url))
            await asyncio.Event().wait()  # until a signal cancels it


def _invitation(url: str) -> Panel:
    lines = f"Chat at        [bold]{url}[/]\nFor programs   {url}/v1\nCtrl-C ends it."
    return Panel(lines, title="Corolla", expand=False)


async def _until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """The first Ctrl-C, SIGTERM or closed terminal ends the work; tidying up is not cut short."""
    task = asyncio.create_task(work)
    signalled = asyncio.Event()

    def stop() -> None:
        if not signalled.is_set():
            signalled.set()
            task.cancel()

    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        # Windows has no SIGHUP, and no handlers in its event loop; there Ctrl-C is a KeyboardInterrupt.
        with suppress(NotImplementedError, AttributeError):
            loop.add_signal_handler(getattr(signal, name), stop)
    try:
        await task
    except asyncio.CancelledError:
        if not signalled.is_set():
            raise


if __name__ == "__main__":
    run_command(app)
