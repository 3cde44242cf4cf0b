"""The quantizations of a CPU, with kernels built once per test run."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch

from peer.model.bits_and_bytes import LlmInt8
from peer.model.quantization import Form, Quantization, choose

FAST = ["fp16", "int8", "int8-fast", "int4"]

ERROR = {"fp16": 0.006, "int8": 0.2, "int8-fast": 0.2, "int4": 0.95, "nf4": 0.95, "llm-int8": 0.2}
"""Relative error of the logits that a tiny random model of the worst family may have; most have a tenth."""


@functools.cache
def kernels() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="corolla-kernels-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def quantization(name: str) -> Quantization:
    if name == "llm-int8":
        # A GPU's, which computes on a CPU as well.
        return Quantization(name, Form(name, LlmInt8), Form(name, LlmInt8))
    chosen = choose(name, torch.float32, torch.device("cpu"), kernels())
    assert chosen is not None
    return chosen
