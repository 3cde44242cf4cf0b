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
    layers: str = "auto"
    """Which layers to hold: what `parse_layers` reads, or `auto` for those that help the swarm most."""
    name: str = ""
    memory_bytes: int | None = None
    """For layers chosen by ourselves and for chats together; None takes a share of what is free."""
    kv_bytes: int | None = None
    """Memory for KV caches and input logs; None takes a share of the memory above."""
    max_sessions: int = 256
    threads: int | None = None
    """Threads to compute with; None measures how many are best."""
    device: str = "auto"
    dtype: Dtype = "auto"
    quantize: str = "auto"
    """In which form weights are kept: `peer.model.quantization.NAMES`."""
    kv_dtype: KvDtype = "auto"
    adapters: tuple[str, ...] = ()
    """Directories with LoRA in PEFT's files, applied for whoever asks for it."""
    direct: bool = True
    listen: Listen | None = Listen()
    """Where the other ends of channels may call, unless `direct` is off; None nowhere."""


class Budget(msgspec.Struct, frozen=True):
    """How memory is shared out."""

    layers_bytes: int
    """For the weights of layers that the peer chooses itself."""
    kv_bytes: int


def memory_budget(settings: PeerSettings, free_bytes: int | None = None) -> Budget:
    """Half of what is free for layers, a quarter for chats: the rest stays the machine's owner's."""
    if free_bytes is None:
        free_bytes = free_memory()
    total = settings.memory_bytes if settings.memory_bytes is not None else free_bytes * 3 // 4
    kv_bytes = settings.kv_bytes if settings.kv_bytes is not None else total // 3
    return Budget(max(0, total - kv_bytes), kv_bytes)


def free_memory() -> int:
    """What is free on this machine now."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 * 10**9  # a system that does not tell


def default_threads() -> int:
    """With how many threads to load. One core is left to the network and to the machine's owner."""
    return max(1, (os.cpu_count() or 1) - 1)
