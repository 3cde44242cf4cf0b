"""Big memory that was freed a moment ago costs nothing the second time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MEASURE = """
import ctypes, resource, sys, threading
from peer.model.allocator import keep_big_temporaries
if sys.argv[1] == "kept":
    assert keep_big_temporaries()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def use():
    size = 100 << 20
    place = libc.malloc(size)
    libc.memset(place, 1, size)
    libc.free(place)
def measure():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


def faults(how: str) -> int:
    """Page faults of using 100 MB for the second time, in a thread that is not the first."""
    command = [sys.executable, "-c", MEASURE, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_big_temporary_is_not_mapped_anew() -> None:
    assert faults("kept") < 100
    assert faults("as usual") > 40  # with pages of 2 MB there are fewer than with 4 KB
