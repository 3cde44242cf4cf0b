"""Tell the C library to keep the memory of big temporaries, which torch asks for again a moment later."""

from __future__ import annotations

import ctypes

BIG_BYTES = 256 * 1024 * 1024
"""What is freed is kept up to this size. glibc's own limit is 32 MB: beyond it each tensor is mapped anew,
page by page. Making float32 of 11.5 million fp16 weights took 29 ms so, and takes 4 ms now."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def keep_big_temporaries() -> bool:
    """For this process, from now on; True where it had an effect, which is with glibc.

    The price: memory that was freed goes back to the system late, so a peer stays near the most it ever took.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # One heap for all threads: the executor's own would hold no more than 64 MB in one piece.
    options = {_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: BIG_BYTES, _M_TRIM_THRESHOLD: BIG_BYTES}
    taken = [mallopt(option, value) for option, value in options.items()]
    return taken == [1] * len(options)
