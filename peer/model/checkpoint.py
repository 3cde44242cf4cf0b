"""A model's config and tensors, wherever its files lie. Reads only what is asked for, and counts it.

Only safetensors are read, never a pickle, and no code from a model's repository is run.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from peer.model.errors import ModelNotFound, UnsupportedModel
from peer.model.source import INDEX, TOKENIZER_FILES, WEIGHTS, Progress, Source, StoredFile, open_source

MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
"""For all tokenizer files together. The largest we know of, for 256 000 tokens, take 35 MB."""

MAX_HEADER_BYTES = 100 * 1024 * 1024
"""safetensors' own bound on the JSON that opens a file."""

READABLE = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a model: its bytes are [start, end) of a file, which knows it as `stored_name`."""

    file: str
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


class Checkpoint:
    """A model's config, and its tensors by name. Weights are read when they are asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name = source.name
        self.raw_config = self._read_json("config.json")
        self.config = self._text_config()
        self.layer_count = int(self.config.num_hidden_layers)
        self.bytes_read = 0
        """Bytes of tensors read so far."""
        self._stored_names = self._find_tensors()
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._open_files: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def tensor_names(self) -> list[str]:
        """Every tensor, by the name it has in a text model."""
        return list(self._stored_names)

    @property
    def total_bytes(self) -> int:
        """The size of all files with weights."""
        return sum(file.bytes for file in self.weight_files())

    @property
    def is_here(self) -> bool:
        """Whether all weights are on this machine."""
        return all(self._source.is_here(file.name) for file in self.weight_files())

    def weight_files(self) -> list[StoredFile]:
        """The files that hold the tensors."""
        return self.files(sorted({file for file, _ in self._stored_names.values()}))

    def files(self, names: Iterable[str]) -> list[StoredFile]:
        """Those of the named files that exist, in the given order."""
        return [self._source.files[name] for name in names if name in self._source.files]

    def read_file(self, name: str) -> bytes:
        """A whole small file."""
        return self._locate(name).read_bytes()

    def fetch(self, tensor_names: Iterable[str], progress: Progress | None = None) -> None:
        """Bring the files that hold these tensors onto this machine. Does nothing for a directory."""
        wanted = self.files(sorted({self._stored_names[name][0] for name in tensor_names}))
        missing = [file for file in wanted if not self._source.is_here(file.name)]
        total = sum(file.bytes for file in missing)
        done = 0
        for file in missing:
            self._locate(file.name, _after(done, total, progress))
            done += file.bytes

    def tensor(self, name: str) -> StoredTensor:
        """What a tensor is and where it lies. Reads the opening of its file."""
        file, stored_name = self._stored_names[name]
        if file not in self._headers:
            self._headers[file] = read_header(self._locate(file), file)
        return self._headers[file][stored_name]

    def read(self, name: str, *, in_place: torch.dtype | None = None) -> torch.Tensor:
        """A tensor as it is stored. If of dtype `in_place`, its memory is the file's own until it is changed.

        Others are copied: of a mapped file all that was looked at counts as this process's memory.
        """
        stored = self.tensor(name)
        if self.dtype_of(name) == in_place:
            tensor = self._mapped(stored)
        else:
            tensor = self._copied(stored, stored.start, stored.shape)
        with self._lock:
            self.bytes_read += stored.bytes
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Rows [start, end) of a tensor as it is stored, counted through all its matrices."""
        stored = self.tensor(name)
        columns = stored.shape[-1]
        row_bytes = columns * self.dtype_of(name).itemsize
        rows = self._copied(stored, stored.start + start * row_bytes, (end - start, columns))
        with self._lock:
            self.bytes_read += rows.nbytes
        return rows

    def dtype_of(self, name: str) -> torch.dtype:
        """In which a tensor is stored. Raises UnsupportedModel for what is not read."""
        stored = self.tensor(name)
        if stored.dtype not in READABLE:
            raise UnsupportedModel(
                f"{self.name} stores {name} as {stored.dtype}: only float32, float16 and bfloat16 are loaded"
            )
        return READABLE[stored.dtype]

    def _mapped(self, stored: StoredTensor) -> torch.Tensor:
        with self._lock:
            if stored.file not in self._open_files:
                self._open_files[stored.file] = safe_open(self._locate(stored.file), framework="pt")
            tensor: torch.Tensor = self._open_files[stored.file].get_tensor(stored.stored_name)
        return tensor

    def _copied(self, stored: StoredTensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        """So many numbers from byte `start` of the tensor's file on."""
        tensor = torch.empty(shape, dtype=READABLE[stored.dtype])
        with self._locate(stored.file).open("rb", buffering=0) as file:
            file.seek(start)
            into = memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))
            while len(into) and (count := file.readinto(into)):
                into = into[count:]
        return tensor

    def read_sample(self, name: str, count: int) -> bytes:
        """Up to `count` bytes from the middle of a tensor, without reading the rest."""
        stored = self.tensor(name)
        with self._locate(stored.file).open("rb") as file:
            file.seek(stored.start + max(0, (stored.bytes - count) // 2))
            return file.read(min(count, stored.bytes))

    def _locate(self, name: str, progress: Progress | None = None) -> Path:
        if name not in self._source.files:
            raise ModelNotFound(f"{self.name} has no file {name}")
        return self._source.locate(name, progress)

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads(self.read_file(name))
        except ValueError as error:
            raise UnsupportedModel(f"{name} of {self.name} is not JSON: {error}") from error
        return values

    def _text_config(self) -> PretrainedConfig:
        if "quantization_config" in self.raw_config:
            kind = self.raw_config["quantization_config"].get("quant_method", "unknown")
            raise UnsupportedModel(
                f"{self.name} is stored quantized ({kind}): give the weights as float16 or bfloat16"
            )
        if self.raw_config.get("is_encoder_decoder"):
            raise UnsupportedModel(f"{self.name} has an encoder: only models that continue a text are served")
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self._locate("config.json").parent, trust_remote_code=False
            )
        except (ValueError, OSError) as error:
            kind = self.raw_config.get("model_type", "unknown")
            raise UnsupportedModel(f"transformers does not know the family {kind} of {self.name}") from error
        text_config: PretrainedConfig = config.get_text_config(decoder=True)
        return text_config

    def _find_tensors(self) -> dict[str, tuple[str, str]]:
        """Tensor name in a text model -> (file, name in that file)."""
        if INDEX in self._source.files:
            where: dict[str, str] = self._read_json(INDEX)["weight_map"]
        elif WEIGHTS in self._source.files:
            where = dict.fromkeys(read_header(self._locate(WEIGHTS), WEIGHTS), WEIGHTS)
        else:
            raise ModelNotFound(f"{self.name} has no {WEIGHTS}: only safetensors are read, never a pickle")
        if "text_config" in self.raw_config:
            return {text_name(name): (file, name) for name, file in where.items()}
        return {name: (file, name) for name, file in where.items()}


def _after(before: int, total: int, progress: Progress | None) -> Progress | None:
    """Progress with one file, told as progress with all."""
    return progress and (lambda done, _: progress(before + done, total))


def text_name(stored_name: str) -> str:
    """The name that a tensor of a text-and-image checkpoint has in the text model alone."""
    return re.sub(
        r"^(?:model\.)?language_model\.(?:model\.)?(lm_head\.)?",
        lambda found: found[1] or "model.",
        stored_name,
    )


def read_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by stored name. Its opening: eight bytes of length, then JSON."""
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise UnsupportedModel(
                f"{path} is no safetensors file: it begins with a header of {length} bytes"
            )
        try:
            header: dict[str, Any] = json.loads(opened.read(length))
        except ValueError as error:
            raise UnsupportedModel(f"{path} is no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = {name: _stored_tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > path.stat().st_size:
        raise UnsupportedModel(f"{path} is cut short: it holds {path.stat().st_size} bytes of {end}")
    return tensors


def _stored_tensor(file: str, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(
        file, name, entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + end
    )


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What turns text into tokens and back, and a conversation into a prompt: file name -> content."""
    found = checkpoint.files(TOKENIZER_FILES)
    size = sum(file.bytes for file in found)
    if size > MAX_TOKENIZER_BYTES:
        raise UnsupportedModel(
            f"the tokenizer files of {checkpoint.name} take {size} bytes, over {MAX_TOKENIZER_BYTES}"
        )
    return {file.name: checkpoint.read_file(file.name) for file in found}


def open_checkpoint(model: str) -> Checkpoint:
    """Open a directory, or a model of the hub by its id. Raises ModelNotFound or UnsupportedModel."""
    return Checkpoint(open_source(model))
