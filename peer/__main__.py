"""`python -m peer`: lend this machine to a swarm."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from peer.devices import in_words
from peer.doctor import doctor
from peer.lifecycle import Peer
from peer.model.allocator import keep_big_temporaries
from peer.settings import DEMO_MODEL, PeerSettings
from peer.tuning.command import tune
from shared import event_loop
from shared.channel.addresses import parse_listen
from shared.errors import SettingsError
from shared.identity import Identity, short
from shared.logs import configure_logs
from shared.settings import (
    AdvertiseOption,
    ListenOption,
    LogLevelOption,
    RelayOption,
    parse_bytes,
    relay_urls,
    run_command,
)

app = typer.Typer(add_completion=False)
app.command()(doctor)
app.command()(tune)


@app.callback(invoke_without_command=True)
def peer(
    context: typer.Context,
    relay: RelayOption = None,
    model: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_MODEL",
            metavar="PATH_OR_HUB_ID",
            help="A directory with safetensors, or a model of the Hugging Face hub.",
            show_default="the built-in demo model",
        ),
    ] = DEMO_MODEL,
    layers: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_LAYERS",
            metavar="RANGE",
            help="0:8 serves layers 0 to 7, 2/3 the second third, all the whole model. auto takes those that"
            " help the swarm most, and others when that changes.",
        ),
    ] = "auto",
    name: Annotated[
        str, typer.Option(envvar="COROLLA_NAME", help="What others see.", show_default="the host name")
    ] = "",
    memory: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_MEMORY",
            metavar="SIZE",
            help="Memory for layers that the peer chooses itself, and for chats.",
            show_default="three quarters of what is free",
        ),
    ] = "",
    kv_memory: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_KV_MEMORY",
            metavar="SIZE",
            help="Memory for the caches of sessions, such as 2GB.",
            show_default="a third of --memory",
        ),
    ] = "",
    max_sessions: Annotated[
        int, typer.Option(envvar="COROLLA_MAX_SESSIONS", min=1, help="Chats served at once, at most.")
    ] = 256,
    threads: Annotated[
        int | None,
        typer.Option(
            envvar="COROLLA_THREADS", min=1, help="Cores to compute with.", show_default="as many as are best"
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_DEVICE", help="auto, cpu, mps, cuda (all GPUs), or GPUs: cuda:1 or cuda:0,cuda:2."
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_DTYPE", help="auto, float32, bfloat16 or float16; alike on all peers of a model."
        ),
    ] = "auto",
    quantize: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_QUANTIZE",
            help="none, fp16, int8, int8-fast, int4 or nf4; alike on all peers of a model.",
            show_default="fp16 on x86 unless --dtype says otherwise, else none",
        ),
    ] = "auto",
    kv_dtype: Annotated[
        str,
        typer.Option(
            envvar="COROLLA_KV_DTYPE",
            help="auto, or int8: chats of twice to four times the length in the same memory, less exactly.",
        ),
    ] = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="LoRA to offer beside the model, in the files of PEFT; chats ask"
            " for it as MODEL+NAME, its name being the directory's. May be repeated.",
        ),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(
            envvar="COROLLA_IDENTITY",
            metavar="FILE",
            help="This peer's key; made on first use.",
            show_default="a new one for this run",
        ),
    ] = None,
    relay_only: Annotated[
        bool, typer.Option("--relay-only", envvar="COROLLA_RELAY_ONLY", help="Open no direct paths.")
    ] = False,
    listen: ListenOption = "0",
    advertise: AdvertiseOption = None,
    log_level: LogLevelOption = "warning",
) -> None:
    """Lend this machine to a swarm: serve a run of a model's layers until Ctrl-C.

    No port needs to be open. Ctrl-C once lets running answers finish, twice leaves at once.
    """
    if context.invoked_subcommand is not None:
        # `peer --relay URL doctor` means the same as `peer doctor --relay URL`.
        names = {"doctor": ("relay", "listen", "advertise", "device", "log_level")}
        told = {
            name: context.params[name]
            for name in names.get(context.invoked_subcommand, ("relay", "model", "log_level"))
        }
        context.default_map = {context.invoked_subcommand: told}
        return
    configure_logs(log_level)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise SettingsError(f"--dtype {dtype} is unknown: write auto, float32, bfloat16 or float16")
    if kv_dtype not in ("auto", "int8"):
        raise SettingsError(f"--kv-dtype {kv_dtype} is unknown: write auto or int8")
    settings = PeerSettings(
        relays=relay_urls(relay),
        model=model,
        layers=layers,
        name=name[:64],
        memory_bytes=parse_bytes(memory) if memory else None,
        kv_bytes=parse_bytes(kv_memory) if kv_memory else None,
        max_sessions=max_sessions,
        threads=threads,
        device=device,
        quantize=quantize,
        dtype=dtype,  # type: ignore[arg-type]  # checked above
        kv_dtype=kv_dtype,  # type: ignore[arg-type]  # checked above
        adapters=tuple(adapter or ()),
        direct=not relay_only,
        listen=parse_listen(listen, advertise or ()),
    )
    key = Identity.load(identity) if identity is not None else Identity.generate()
    with contextlib.suppress(KeyboardInterrupt):
        event_loop.run(_run(settings, key))


async def _run(settings: PeerSettings, key: Identity) -> None:
    keep_big_temporaries()
    console = Console()
    leaving = _Leaving()
    bar = _loading_bar(console)
    task = bar.add_task("loading", total=None)

    def progress(done_bytes: int, total_bytes: int) -> None:
        bar.update(task, completed=done_bytes, total=total_bytes)

    with leaving.on_signals(), bar, contextlib.suppress(asyncio.CancelledError):
        async with Peer(settings, key, progress=progress, notice=console.print) as peer:
            bar.stop()
            # What is loaded stays. Python would look through all of it now and then, and chats wait 0.2 s.
            gc.collect()
            gc.freeze()
            _tell(console, peer)
            await leaving.asked()
            if peer.service and peer.service.session_count:
                console.print(f"finishing {peer.service.session_count} answers; Ctrl-C again leaves at once")
            await peer.drain()
    console.print("left the swarm")


def _tell(console: Console, peer: Peer) -> None:
    assert peer.service is not None
    console.print(
        f"[green]serving[/] layers {peer.layers} of {peer.layer_count} of [bold]{escape(peer.model)}[/]"
        f" as [bold]{escape(peer.name)}[/] ({short(peer.identity.id)})"
        f" on {in_words(peer.devices)} in {peer.numbers}"
    )
    relays = " and ".join(peer.relays.connected_urls)
    port = f" and on TCP port {peer.dialer.port.port}" if peer.dialer.port is not None else ""
    console.print(
        f"room for {peer.service.kv_tokens_free:,} tokens of chats"
        f" in {peer.kv_budget.total_bytes / 1e9:.1f} GB; meets others at {relays}{port}; Ctrl-C leaves"
    )


class _Leaving:
    """Ctrl-C (or SIGTERM): while serving the first one asks to leave; any other ends the run."""

    def __init__(self) -> None:
        self._wanted = asyncio.Event()
        self._waiting = False

    async def asked(self) -> None:
        """Returns at the first signal."""
        self._waiting = True
        await self._wanted.wait()
        self._waiting = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        running = asyncio.current_task()
        assert running is not None

        def signalled() -> None:
            if self._waiting and not self._wanted.is_set():
                self._wanted.set()
            else:
                running.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, signalled)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _loading_bar(console: Console) -> Progress:
    """Bytes read, bytes in all, and the time left; nothing where nobody watches a terminal."""
    columns = (TextColumn("loading layers"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    run_command(app)
