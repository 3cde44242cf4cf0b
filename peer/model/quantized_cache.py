"""Quantized weights kept on disk, so that a span is quantized once. One safetensors file per layer.

The directory is named by the artefact, which tells checkpoint and quantization. Deleting it costs time alone.
Files are mapped into memory, so two peers on one machine share what is in them.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

log = logging.getLogger(__name__)

ALIGNMENT = 64
"""A line of the processor's cache: a load across two of them takes twice as long."""

_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.bfloat16: "BF16"}


class QuantizedCache:
    """The files of one artefact. Names of tensors are `<parameter>#<expert>#<form>#<tensor>`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, layer: str) -> dict[str, torch.Tensor]:
        """All tensors of a layer by name, mapped from its file; none when there is no whole file."""
        path = self._path(layer)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not iterable
        except FileNotFoundError:
            return {}
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read and is made anew: %s", path, error)
            return {}

    def save(self, layer: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a layer's tensors. A disk that is full costs the next start its time, and nothing else."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Moved to its place when it is whole: another peer may read or write the same layer now.
            with tempfile.TemporaryDirectory(dir=self._directory) as folder:
                written = Path(folder, "layer")
                _write(written, tensors)
                written.replace(self._path(layer))
        except OSError as error:
            log.warning("quantized weights could not be kept in %s: %s", self._directory, error)

    def _path(self, layer: str) -> Path:
        return self._directory / f"{layer}.safetensors"


def layer_of(parameter: str) -> str:
    """The file that a parameter belongs to: its layer's number, or `ends`."""
    found = re.search(r"\.(\d+)\.", parameter)
    return f"layer-{found[1]}" if found else "ends"


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """As safetensors' own writer, which would hold every tensor twice, and aligned."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    opening = json.dumps(header, separators=(",", ":")).encode()
    opening += b" " * (-(len(opening) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(opening).to_bytes(8, "little") + opening)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
