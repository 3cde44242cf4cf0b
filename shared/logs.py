"""How the commands write their logs: coloured on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

from shared.errors import SettingsError

LEVELS = ("debug", "info", "warning", "error")

# Their debug and info lines tell of single packets and requests, and would bury ours.
_CHATTY = ("aioice", "aiortc", "aiohttp.access", "asyncio", "httpx", "httpcore", "urllib3", "filelock")


def configure_logs(level: str = "info") -> None:
    """Send logs to standard error. Raises SettingsError for a level that is none of LEVELS."""
    if level.lower() not in LEVELS:
        raise SettingsError(f"--log-level {level!r} is not a level: use {', '.join(LEVELS)}")
    logging.basicConfig(level=level.upper(), handlers=[_handler()], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _handler() -> logging.Handler:
    if sys.stderr.isatty():
        # rich honours NO_COLOR by itself (no-color.org). Markup stays off, since names come from others.
        return RichHandler(
            console=Console(stderr=True), show_path=False, markup=False, log_time_format="[%H:%M:%S]"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


class _PlainLine(logging.Formatter):
    """One record, one line: text from other participants cannot forge a second one."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.exc_info:
            return line
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
