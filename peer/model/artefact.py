"""Name the exact weights: two peers may share a route only when their artefacts are the same.

The name is a hash over everything that decides which tokens come out: the config, the tokenizer files, the
precision, and the weights themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from peer.model.checkpoint import Checkpoint, tokenizer_files
from shared.tokenizer_files import files_hash

SAMPLE_BYTES = 256
"""Read from the middle of each tensor. One page of disk per tensor: a second or two for a large model."""

VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}
"""Keys of a config that tell where it came from, not what the model computes."""

NOT_TOKENIZER = {"config.json", "generation_config.json"}


def artefact_id(checkpoint: Checkpoint, dtype: str, quantization: str | None) -> str:
    """The artefact's name: 64 hex digits.

    Of a directory, each tensor counts by name, type, shape and a sample of its bytes, wherever its file
    lies and however the tensors are spread over files. Two trainings of one model differ, since they change
    nearly every tensor throughout; a change of a few numbers outside the samples goes unseen. So this tells
    artefacts apart, but is no proof against someone who forges weights on purpose. Whole files are never
    read.

    Of the hub, each file with weights counts by the hub's own hash of its whole content. So a directory and
    the hub give different names to the same weights.
    """
    digest = hashlib.sha256()
    for part in _parts(checkpoint, dtype, quantization):
        # Each part with its length, so that no two lists of parts read the same.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _parts(checkpoint: Checkpoint, dtype: str, quantization: str | None) -> Iterator[bytes]:
    yield b"corolla-artefact-1"
    yield _canonical({"dtype": dtype, "quantization": quantization})
    yield _canonical(_lasting(checkpoint.raw_config))
    files = tokenizer_files(checkpoint)
    yield files_hash({name: files[name] for name in files.keys() - NOT_TOKENIZER}).encode()
    weights = checkpoint.weight_files()
    if all(file.fingerprint for file in weights):
        for file in weights:
            yield _canonical([file.name, file.bytes, file.fingerprint])
        return
    for name in sorted(checkpoint.tensor_names):
        tensor = checkpoint.tensor(name)
        yield _canonical([name, tensor.dtype, tensor.shape])
        yield checkpoint.read_sample(name, SAMPLE_BYTES)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """A config without its volatile keys, inner configs included."""
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in VOLATILE
    }


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
