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


SHAPES = {
    "llama": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 8000,
    },
    "mixtral": {
        "hidden_size": 768,
        "intermediate_size": 1280,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_local_experts": 12,
        "vocab_size": 8000,
    },
}
"""Of 93 and 120 million parameters; the experts of a layer lie in the files one by one."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models in bfloat16, about 200 MB, in files of 60 MB; and tiny ones beside them."""
    directory = tmp_path_factory.mktemp("memory")
    for family, shape in SHAPES.items():
        model = random_model(config_of(family, **shape)).bfloat16()
        save(model, directory / family / "large", max_shard_size="60MB")
        save(random_model(FAMILIES[family]()), directory / family / "tiny")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quantize", "kept"),
    [
        ("llama", "none", False),
        ("llama", "fp16", False),
        ("llama", "int8", True),
        ("llama", "int8-fast", False),
        ("llama", "int4", True),
        ("mixtral", "none", False),
        ("mixtral", "fp16", False),
        ("mixtral", "int4", False),
    ],
)
def test_a_span_is_never_twice_in_memory(
    directory: Path, tmp_path: Path, family: str, quantize: str, kept: bool
) -> None:
    """When it is read and, if it is `kept` on disk, when it is taken from there."""
    module = "tests.peer.model.test_loading_memory"
    command = [sys.executable, "-m", module, str(directory / family), str(tmp_path), quantize]
    for _ in range(1 + kept):
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=80)
        found = json.loads(run.stdout.splitlines()[-1])
        assert found["span"] > 50 * MB
        assert found["peak"] <= ALLOWED * found["span"]


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
