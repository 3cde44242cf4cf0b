"""What a peer is told to do, checked before anything is opened or loaded."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Literal

import msgspec

from shared.channel.addresses import Listen
from shared.errors import SettingsError

DEMO_MODEL = str(Path(__file__).parent / "demo" / "corolla-demo")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class PeerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `python -m peer` can be told."""

    relay: str
    model: str = DEMO_MODEL
    layers: str = "all"
    name: str = ""
    kv_bytes: int | None = None
    """Memory for KV caches and input logs; None takes a share of what is free."""
    max_sessions: int = 256
    threads: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    direct: bool = True
    listen: Listen | None = Listen()
    """Where the other ends of channels may call, unless `direct` is off; None nowhere."""


def parse_bytes(text: str) -> int:
    """Read `6GB`, `500 MB` or a plain number of bytes. Raises SettingsError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)B?\s*", text.upper())
    if match is None:
        raise SettingsError(f"{text!r} is not a size: write for example 6GB or 500MB")
    # A float would round what is over 2^53, and 2097.151 MB to a byte too few.
    return int(Fraction(match[1]) * _UNITS[match[2]])


def default_kv_bytes() -> int:
    """A quarter of the memory that is free now, so that the machine stays its owner's."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 8 * 10**9  # a system that does not tell
    return free // 4


def default_threads() -> int:
    """One core is left to the network and to the machine's owner: a second torch thread there costs more."""
    return max(1, (os.cpu_count() or 1) - 1)
