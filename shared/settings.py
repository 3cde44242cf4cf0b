"""What the three commands share: common flags and their defaults, and how an error ends a command.

A setting is taken from its flag, else from its environment variable, else from its default.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from yarl import URL

from shared.errors import CorollaError, SettingsError

DEFAULT_RELAY = "http://127.0.0.1:8787"

MAX_RELAYS = 4
"""An announcement names no more; each costs a connection and the renewals on it."""
MAX_URL = 200
"""As an announcement may hold it."""

RelayOption = Annotated[
    list[str] | None,
    typer.Option(
        "--relay",
        envvar="COROLLA_RELAY",
        metavar="URL",
        help="A relay to meet others at. Given two or three times, any of them may go away.",
        show_default=DEFAULT_RELAY,
    ),
]
ListenOption = Annotated[
    str,
    typer.Option(
        "--listen",
        envvar="COROLLA_LISTEN",
        metavar="PORT|HOST:PORT|off",
        help="TCP port where those whom the relay introduced may connect directly; 0 takes a free one.",
    ),
]
AdvertiseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--advertise",
        envvar="COROLLA_ADVERTISE",
        metavar="HOST:PORT",
        help="Where your router passes connections on to that port. May be given several times.",
    ),
]
LogLevelOption = Annotated[
    str,
    typer.Option("--log-level", envvar="COROLLA_LOG_LEVEL", help="debug, info, warning or error."),
]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def data_directory() -> Path:
    """Where keys and databases live: COROLLA_HOME, else this system's place for a program's data."""
    if home := os.environ.get("COROLLA_HOME"):
        return Path(home).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "corolla"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "corolla"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "corolla"


def parse_bytes(text: str) -> int:
    """Read `6GB`, `500 MB` or a plain number of bytes. Raises SettingsError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)B?\s*", text.upper())
    if match is None:
        raise SettingsError(f"{text!r} is not a size: write for example 6GB or 500MB")
    # A float would round what is over 2^53, and 2097.151 MB to a byte too few.
    return int(Fraction(match[1]) * _UNITS[match[2]])


def relay_url(text: str) -> URL:
    """The WebSocket address of a relay given as http(s)://host:port or ws(s)://host:port.

    Raises SettingsError for anything else.
    """
    example = f"write it like {DEFAULT_RELAY} or wss://relay.example.org"
    try:
        url = URL(text.strip())
        port = url.port
    except ValueError:
        raise SettingsError(f"{text!r} is not the address of a relay: {example}") from None
    if url.scheme not in ("http", "https", "ws", "wss") or not url.host or not port:
        raise SettingsError(f"{text!r} is not the address of a relay: {example}")
    if url.user or url.password or url.query_string or url.fragment:
        raise SettingsError(f"the address of a relay has no user, question mark or hash sign: {example}")
    scheme = "wss" if url.scheme in ("https", "wss") else "ws"
    path = url.path.rstrip("/")
    return url.with_scheme(scheme).with_path(path if path.endswith("/ws") else f"{path}/ws")


def relay_urls(given: Sequence[str] | None) -> tuple[str, ...]:
    """The relays of a command line, or of COROLLA_RELAY, where commas divide them.

    Raises SettingsError for one that is no address, and for more than an announcement can name.
    """
    urls = [url.strip() for text in given or () for url in text.split(",") if url.strip()]
    urls = list({str(relay_url(url)): url for url in urls}.values()) or [DEFAULT_RELAY]
    if len(urls) > MAX_RELAYS:
        raise SettingsError(f"{len(urls)} relays are too many: name {MAX_RELAYS} at most")
    if longest := next((url for url in urls if len(url) > MAX_URL), None):
        raise SettingsError(f"the address {longest[:40]}… is too long: {MAX_URL} letters at most")
    return tuple(urls)


def run_command(app: typer.Typer) -> NoReturn:
    """Run a command line and exit: 0 well, 1 for an error of ours, 2 for a flag that cannot be used.

    An error of ours is one sentence on standard error, never a traceback: it was written for a person.
    """
    app.pretty_exceptions_enable = False
    try:
        # In its standalone mode typer itself ends the process for wrong flags (2), `--help` (0) and Ctrl-C.
        app()
    except CorollaError as error:
        Console(stderr=True, soft_wrap=True).print(f"Error: {error}", style="bold red", markup=False)
        sys.exit(2 if isinstance(error, SettingsError) else 1)
    sys.exit(0)
