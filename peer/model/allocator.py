"""How glibc's malloc treats large memory: given back at once while a span loads, kept while it computes.

Left to itself malloc learns from the first large tensor that is freed to keep the like, and the weights that
are read one after another then leave holes: a span of 203 MB took 379 MB while it was loaded. For temporary
tensors of a computation it is the other way round: memory that was given back has to be zeroed anew page by
page, which took ten times as long as writing to it. Other allocators are left as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of malloc.h."""

WHILE_LOADING = 1 << 20
"""Larger pieces get memory of their own, which goes back to the system when they are freed."""

WHILE_COMPUTING = 32 << 20
"""The most that glibc allows."""

KEPT = 128 << 20
"""Free memory that is kept for the next temporary tensors."""


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Within it large memory is given back when it is freed; after it, it is kept."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, WHILE_LOADING)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(MMAP_THRESHOLD, WHILE_COMPUTING)
        libc.mallopt(TRIM_THRESHOLD, KEPT)
