"""Our own C kernels, compiled for this machine's processor when one is first asked for, and kept on disk.

Each is one source beside this file, with `lanes.h` for what differs between processors.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from peer.model.errors import NoKernel

SOURCES = Path(__file__).parent
SHARED = SOURCES / "lanes.h"

FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off")
"""No fused multiply-adds but those that are written: they would round differently with each compiler."""

BUILD_S = 120.0


@cache
def library(name: str, directory: Path) -> ctypes.CDLL:
    """The functions of `name`.c, built into `directory` if they are not there yet. Raises NoKernel."""
    compiler = next(filter(None, (shutil.which(name) for name in _compilers())), None)
    if compiler is None:
        raise NoKernel("there is no C compiler on this machine (cc, gcc or clang)")
    source = SOURCES / f"{name}.c"
    built = directory / f"{name}-{_fingerprint(compiler, source)}.so"
    if not built.exists():
        _build(compiler, source, built)
    return ctypes.CDLL(str(built))


def _compilers() -> list[str]:
    chosen = os.environ.get("CC")
    return [chosen] if chosen else ["cc", "gcc", "clang"]


def _fingerprint(compiler: str, source: Path) -> str:
    """Of all that decides what a library does and where it runs: sources, flags, compiler, processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_S).stdout
    digest = hashlib.sha256(source.read_bytes() + SHARED.read_bytes())
    digest.update(" ".join(FLAGS).encode() + version + _processor())
    return digest.hexdigest()[:16]


def _processor() -> bytes:
    """Its kind and instructions: a home directory may be shared by several machines."""
    told = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return told.encode()
    return (
        told + "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    ).encode()


def _build(compiler: str, source: Path, built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    errors = ""
    # Some compilers come without OpenMP; a kernel then computes on one core.
    for threads in (["-fopenmp"], []):
        with tempfile.NamedTemporaryFile(dir=built.parent, suffix=".so", delete=False) as file:
            made = Path(file.name)
        command = [compiler, *FLAGS, native, *threads, str(source), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
        if done.returncode == 0:
            # In one step, since another peer may build the same at this moment.
            made.replace(built)
            return
        made.unlink()
        errors = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    raise NoKernel(f"{compiler} could not compile the kernel for this processor ({errors})")
