"""How glibc's malloc treats large memory: given back at once while a span loads, kept while it computes.

Left to itself malloc learns from the first large tensor that is freed to keep the like, and the weights that
are read one after another then leave holes: a span of 203 MB took 379 MB while it was loaded. For temporary
tensors of a computation it is the other way round: memory that was given back has to be mapped anew page by
page. Making float32 of 11.5 million fp16 weights took 29 ms so, and takes 4 ms where it is kept. Other
allocators are left as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# Names of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

WHILE_LOADING_BYTES = 1 << 18
"""Larger pieces get memory of their own, which goes back to the system when they are freed."""
KEPT_BYTES = 256 << 20
"""What is freed while computing is kept up to this size; glibc's own limit is 32 MB."""


def keep_big_temporaries() -> bool:
    """For this process, from now on; True where it had an effect, which is with glibc.

    The price: memory that was freed goes back to the system late, so a peer stays near the most it ever took.
    """
    # One heap for all threads: the executor's own would hold no more than 64 MB in one piece.
    return _tell({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: KEPT_BYTES, _M_TRIM_THRESHOLD: KEPT_BYTES})


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Within it large memory is given back when it is freed; after it, it is kept."""
    if not _tell({_M_MMAP_THRESHOLD: WHILE_LOADING_BYTES}):
        yield
        return
    try:
        yield
    finally:
        ctypes.CDLL(None).malloc_trim(0)
        keep_big_temporaries()


def _tell(options: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, value) for option, value in options.items()]
    return taken == [1] * len(options)
