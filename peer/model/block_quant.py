"""Weights in blocks of 32 with a scale each, 8 or 4 bits a number, multiplied by our own C kernel.

The kernel (`block_quant.c`) is compiled for this machine's processor when it is first asked for, and kept in
the data directory. Relative error on random weights: 0.5 % with 8 bits, 8 % with 4; rounded activations add
another 0.5 %. A row gives the same bits alone, among others, and on every processor.
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
from typing import Any

import torch

from peer.model.errors import NoKernel
from peer.model.unread import Matrix, pieces
from peer.model.weights import Weights

SOURCE = Path(__file__).with_name("block_quant.c")
TILE = 16
BLOCK = 32

FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off")
"""No fused multiply-adds but those that are written: they would round differently with each compiler."""

BUILD_S = 120.0


class BlockQuantized(Weights):
    """`values` uint8 and `scales` float16 in the layout that the kernel's source describes."""

    def __init__(
        self,
        kernel: Any,  # noqa: ANN401 - functions of a C library
        bits: int,
        outputs: int,
        inputs: int,
        values: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        self.outputs, self.inputs = outputs, inputs
        self._bits = bits
        self._blocks = -(-inputs // BLOCK)
        self._values, self._scales = values, scales
        self._kernel = kernel
        self._multiply = kernel.multiply_8 if bits == 8 else kernel.multiply_4

    @classmethod
    def pack(cls, kernel: Any, bits: int, matrix: Matrix) -> BlockQuantized:  # noqa: ANN401
        """Round a matrix, some tiles at a time."""
        outputs, inputs = matrix.shape
        tiles, blocks = -(-outputs // TILE), -(-inputs // BLOCK)
        values = torch.empty(tiles, blocks * TILE * BLOCK * bits // 8, dtype=torch.uint8)
        scales = torch.empty(tiles, blocks * TILE, dtype=torch.float16)
        threads = torch.get_num_threads()
        for rows, piece in pieces(matrix, multiple=TILE):
            # Held by its name until the kernel is done with the memory.
            numbers = piece.contiguous()
            first = rows.start // TILE
            into = values[first].data_ptr(), scales[first].data_ptr()
            kernel.pack(numbers.data_ptr(), len(numbers), inputs, bits, *into, threads)
        return cls(kernel, bits, outputs, inputs, values.view(-1), scales.view(-1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        rows = x.numel() // self.inputs
        result = x.new_empty(*x.shape[:-1], self.outputs)
        # The kernel's scratch memory: the rounded activations, their scales and sums.
        rounded = torch.empty(rows * self._blocks * BLOCK, dtype=torch.int8)
        row_scales = torch.empty(2, rows * self._blocks)
        self._multiply(
            self._values.data_ptr(),
            self._scales.data_ptr(),
            x.data_ptr(),
            rows,
            self.outputs,
            self.inputs,
            rounded.data_ptr(),
            row_scales.data_ptr(),
            row_scales[1].data_ptr(),
            result.data_ptr(),
            torch.get_num_threads(),
        )
        return result

    def dense(self) -> torch.Tensor:
        weight = torch.empty(self.outputs, self.inputs)
        self._kernel.unpack(
            self._values.data_ptr(),
            self._scales.data_ptr(),
            self.outputs,
            self.inputs,
            self._bits,
            weight.data_ptr(),
            torch.get_num_threads(),
        )
        return weight

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self._values, "scales": self._scales}


@cache
def kernel(directory: Path) -> Any:  # noqa: ANN401 - functions of a C library
    """The compiled kernel, built into `directory` if it is not there yet. Raises NoKernel."""
    compiler = next(filter(None, (shutil.which(name) for name in _compilers())), None)
    if compiler is None:
        raise NoKernel("there is no C compiler on this machine (cc, gcc or clang)")
    library = directory / f"block_quant-{_fingerprint(compiler)}.so"
    if not library.exists():
        _build(compiler, library)
    loaded = ctypes.CDLL(str(library))
    address, number = ctypes.c_void_p, ctypes.c_int
    multiply = [address] * 3 + [number] * 3 + [address] * 4 + [number]
    loaded.multiply_8.argtypes = loaded.multiply_4.argtypes = multiply
    loaded.pack.argtypes = [address, number, number, number, address, address, number]
    loaded.unpack.argtypes = [address, address, number, number, number, address, number]
    for function in (loaded.multiply_8, loaded.multiply_4, loaded.pack, loaded.unpack):
        function.restype = None
    return loaded


def _compilers() -> list[str]:
    chosen = os.environ.get("CC")
    return [chosen] if chosen else ["cc", "gcc", "clang"]


def _fingerprint(compiler: str) -> str:
    """Of all that decides what the library does and where it runs: source, flags, compiler, processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_S).stdout
    digest = hashlib.sha256(SOURCE.read_bytes())
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


def _build(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    errors = ""
    # Some compilers come without OpenMP; the kernel then computes on one core.
    for threads in (["-fopenmp"], []):
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as file:
            made = Path(file.name)
        command = [compiler, *FLAGS, native, *threads, str(SOURCE), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
        if done.returncode == 0:
            # In one step, since another peer may build the same at this moment.
            made.replace(library)
            return
        made.unlink()
        errors = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    raise NoKernel(f"{compiler} could not compile the kernel for this processor ({errors})")
