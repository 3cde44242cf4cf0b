"""What a peer is told to do, checked before anything is opened or loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from shared.channel.addresses import Listen

DEMO_MODEL = str(Path(__file__).parent / "demo" / "corolla-demo")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

KvDtype = Literal["auto", "int8"]
"""How sessions keep their keys and values: as they are computed, or in eight bits."""


class PeerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `python -m peer` can be told."""

    relays: tuple[str, ...]
    model: str = DEMO_MODEL
    layers: str = "all"
    name: str = ""
    kv_bytes: int | None = None
    """Memory for KV caches and input logs; None takes a share of what is free."""
    max_sessions: int = 256
    threads: int | None = None
    """Threads to compute with; None measures how many are best."""
    device: str = "auto"
    dtype: Dtype = "auto"
    quantize: str = "auto"
    """In which form weights are kept: `peer.model.quantization.NAMES`."""
    kv_dtype: KvDtype = "auto"
    direct: bool = True
    listen: Listen | None = Listen()
    """Where the other ends of channels may call, unless `direct` is off; None nowhere."""


def default_kv_bytes() -> int:
    """A quarter of the memory that is free now, so that the machine stays its owner's."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 8 * 10**9  # a system that does not tell
    return free // 4


def default_threads() -> int:
    """With how many threads to load. One core is left to the network and to the machine's owner."""
    return max(1, (os.cpu_count() or 1) - 1)
