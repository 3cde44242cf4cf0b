"""Which devices of this machine a peer computes on, in which numbers, and where each of its layers lies."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate

import torch

from peer.settings import PeerSettings, free_memory
from shared.errors import SettingsError


def choose_devices(asked: str) -> tuple[torch.device, ...]:
    """What `--device` says, which is one device or several GPUs: `cuda` is all there are.

    Raises SettingsError for a device that this machine does not have.
    """
    names = [name.strip() for name in asked.split(",")]
    if names in (["auto"], ["cuda"]) and (gpus := _gpus()):
        return gpus
    if names == ["auto"]:
        names = ["mps" if torch.backends.mps.is_available() else "cpu"]
    try:
        found = tuple(dict.fromkeys(_device(name) for name in names))
    except (RuntimeError, AssertionError):
        raise SettingsError(
            f"--device {asked} is not on this machine; leave it out to take what is"
        ) from None
    if len(found) > 1 and any(device.type != "cuda" for device in found):
        raise SettingsError(f"--device {asked}: only GPUs go together; write one device, or cuda:0,cuda:1")
    return found


def _gpus() -> tuple[torch.device, ...]:
    """All that compute: one that is too old for this torch does not."""
    found = []
    for number in range(torch.cuda.device_count()):
        with suppress(RuntimeError):
            found.append(_device(f"cuda:{number}"))
    return tuple(found)


def _device(name: str) -> torch.device:
    found = torch.device(name)
    torch.zeros(1, device=found).item()  # some devices hold tensors and no numbers
    return found


def compute_dtype(settings: PeerSettings, device: torch.device) -> torch.dtype:
    """The numbers that were asked for, or those in which such a device computes well."""
    if settings.dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    # bf16 and fp16 products are seven times slower than f32 on a CPU without instructions for them.
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def free_bytes(device: torch.device) -> int:
    """Free memory where weights and caches will lie."""
    if device.type != "cuda":
        return free_memory()
    # What torch keeps of layers that are gone is free for others.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def in_words(devices: Sequence[torch.device]) -> str:
    """As its owner would say."""
    if devices[0].type != "cuda":
        return devices[0].type
    names = [torch.cuda.get_device_name(device) for device in devices]
    return f"cuda ({', '.join(names)})"


def spread(layers: Sequence[int], ends: int, free: Sequence[int]) -> list[int]:
    """The device of each layer, by number: consecutive ones together, each device filled to the same part.

    `layers` are their bytes and `ends` those of embedding and head, which lie on the first device; `free` is
    what each device has.
    """
    full = (ends + sum(layers)) / max(1, sum(free))
    filled_up_to = [total * full for total in accumulate(free)]
    # A layer belongs where its middle comes to lie.
    middles = [ends + end - size / 2 for end, size in zip(accumulate(layers), layers, strict=True)]
    return [min(bisect(filled_up_to, middle), len(free) - 1) for middle in middles]
