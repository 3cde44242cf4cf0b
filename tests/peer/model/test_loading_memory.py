"""Loading takes little more memory than the span itself, told by a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from peer.model.checkpoint import open_checkpoint
from peer.model.quantization import choose
from peer.model.quantized_cache import QuantizedCache
from peer.model.span import Span
from tests.peer.model.families import FAMILIES, config_of, random_model, save

ALLOWED = 1.15
"""Peak while loading, over what the loaded span takes."""
MB = 1_000_000
PAGE = 4096


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 93 million parameters in bfloat16, 190 MB, in files of 60 MB; and a tiny one beside it."""
    directory = tmp_path_factory.mktemp("memory")
    config = config_of(
        "llama",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8000,
    )
    save(random_model(config).bfloat16(), directory / "large", max_shard_size="60MB")
    save(random_model(FAMILIES["llama"]()), directory / "tiny")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "fp16", "int8", "int8-fast"])
def test_a_span_is_never_twice_in_memory(directory: Path, tmp_path: Path, quantize: str) -> None:
    module = "tests.peer.model.test_loading_memory"
    command = [sys.executable, "-m", module, str(directory), str(tmp_path), quantize]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, timeout=80) for _ in range(2)]
    read, from_cache = (json.loads(run.stdout.splitlines()[-1]) for run in runs)

    assert read["span"] > 80 * MB
    assert read["peak"] <= ALLOWED * read["span"]
    assert from_cache["peak"] <= ALLOWED * from_cache["span"]


class Peak:
    """The most memory this process has had at a time, in a thread that looks every millisecond."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._before = resident()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, resident() - self._before)
            time.sleep(0.001)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def load(directory: Path, cache: Path, quantize: str) -> Span:
    cpu = torch.device("cpu")
    quantization = choose(quantize, torch.float32, cpu, cache / "kernels")
    checkpoint = open_checkpoint(str(directory))
    quantized = QuantizedCache(cache / directory.name)
    return Span.load(checkpoint, 0, checkpoint.layer_count, quantization=quantization, quantized=quantized)


def main() -> None:
    directory, cache, quantize = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    # What libraries load when they are first used is not the span's.
    load(directory / "tiny", cache, quantize)
    with Peak() as peak:
        span = load(directory / "large", cache, quantize)
    print(json.dumps({"peak": peak.bytes, "span": span.weights_bytes}))


if __name__ == "__main__":
    main()
