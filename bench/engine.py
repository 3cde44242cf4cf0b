"""How fast one span computes, against transformers' generation and llama.cpp, on models with random weights.

All are in one process with the same number of threads and are asked in turn, round after round: a busy
machine is then busy for all of them; medians. Compare figures of one run only. llama.cpp takes part when the
bench-only extra is installed (`pip install 'corolla[bench]'`, which compiles for many minutes). Then 1, 4 and
16 sessions go through the span with the default weights as on a peer, without a network.

    python -m bench.engine [--models 100m,1b] [--rounds 5] [--tokens 8] [--threads 1]
    python -m bench.engine --device cuda

On a GPU it is a model of 7 billion parameters in bf16 and nf4 instead, by itself: bytes of weights per second
of one session over the rate at which the card copies memory, and tokens per second of 1, 16 and 64 sessions,
for a span of 8 layers and one of all.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from bench import gpu, sessions
from bench.engines import Engine, LlamaCpp, OneSpan, Times, transformers_engines
from bench.gguf_file import write_gguf
from bench.models import SHAPES, random_llama, save_llama
from bench.one_process import prompt
from peer.model.checkpoint import open_checkpoint
from peer.settings import default_threads

SPANS = {"f32": "none", "fp16": "fp16", "int8": "int8", "int8-fast": "int8-fast", "int4": "int4"}
PREFILL = 512
CONTEXTS = (128, 1024)
ROOM = 1152
"""Positions of every cache."""
YARDSTICK = "transformers"
WIDTHS = (1, 4, 16)
"""Sessions at a time."""
GPU_WIDTHS = (1, 16, 64)
GPU_WEIGHTS = {"none": "bf16", "nf4": "nf4"}


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def engines(model: Path, folder: Path, threads: int) -> dict[str, Engine]:
    """All who take part."""
    found = transformers_engines(model, ROOM)
    for name, quantize in SPANS.items():
        log(f"  loading {name}")
        found[name] = OneSpan(model, quantize, folder, ROOM)
    if has_llama_cpp():
        for kind in ("F32", "Q8_0", "Q4_0"):
            log(f"  writing {kind}")
            file = write_gguf(model, folder / f"{model.name}-{kind}.gguf", kind)
            found[f"llama.cpp {kind.lower()}"] = LlamaCpp(file, threads, ROOM)
    return found


def has_llama_cpp() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def measure(parties: dict[str, Engine], options: argparse.Namespace) -> dict[str, dict[str, Times]]:
    """What is measured -> engine -> times. The prompt is read twice, which fills the caches to 1,024."""
    ids = prompt(PREFILL, 32000)
    found: dict[str, dict[str, Times]] = {"prefill": {}}
    for position in (0, PREFILL):
        for name, engine in parties.items():
            log(f"  prefill at {position}: {name}")
            found["prefill"].setdefault(name, []).extend(engine.read(ids, position))
    # The longest first: going back forgets what is behind.
    for context in sorted(CONTEXTS, reverse=True):
        times: dict[str, Times] = {name: [] for name in parties}
        for number in range(options.rounds + 1):
            for name, engine in parties.items():
                heard = engine.continue_from(context, options.tokens)
                if number:  # the first round warms up
                    times[name] += heard
        found[f"decode at {context}"] = times
    return found


def milliseconds(times: Times, column: int = 0) -> float:
    return median(time[column] for time in times)


def show(found: dict[str, dict[str, Times]]) -> None:
    for what, times in found.items():
        tokens = PREFILL if what == "prefill" else 1
        print(f"\n  {what}: tokens/s; milliseconds of the wall and of all cores for a token")
        for name, measured in times.items():
            if measured:
                wall, cpu = (milliseconds(measured, column) / tokens for column in (0, 1))
                print(f"    {name:28} {1000 / wall:8.1f}   {wall:8.2f} {cpu:8.2f}")


def ratios(found: dict[str, dict[str, Times]]) -> dict[str, float | None]:
    """How many times faster the span is. Decode: the geometric mean over the contexts."""

    def decode(ours: str, theirs: str) -> float | None:
        product: float = 1.0
        for context in CONTEXTS:
            times = found[f"decode at {context}"]
            if theirs not in times:
                return None
            product *= milliseconds(times[theirs]) / milliseconds(times[ours])
        mean: float = product ** (1 / len(CONTEXTS))
        return round(mean, 3)

    prefill, q8 = found["prefill"], "llama.cpp q8_0"
    return {
        "decode_vs_transformers": decode("fp16", YARDSTICK),
        "decode_vs_transformers_f32": decode("f32", YARDSTICK),
        "decode_vs_llamacpp_f32": decode("f32", "llama.cpp f32"),
        "decode_vs_llamacpp_q8": decode("int8-fast", q8),
        "decode_vs_llamacpp_q4": decode("int4", "llama.cpp q4_0"),
        "prefill_vs_llamacpp_q8": (
            round(milliseconds(prefill[q8]) / milliseconds(prefill["int8-fast"]), 3)
            if q8 in prefill
            else None
        ),
    }


def compare(shape: str, options: argparse.Namespace) -> dict[str, float | None]:
    """One model, with everyone on it."""
    with tempfile.TemporaryDirectory(prefix="corolla-engine-") as directory:
        folder = Path(directory)
        log(f"making the {shape} model")
        model = random_llama(folder / shape, **SHAPES[shape])
        gc.collect()
        parties = engines(model, folder, options.threads)
        with torch.inference_mode():
            found = measure(parties, options)
        print(f"\nrandom Llama, {shape}")
        show(found)
        together = rates(parties["fp16"], options)
    return {**ratios(found), "batch16_vs_1": round(together[16] / together[1], 3)}


def rates(engine: Engine, options: argparse.Namespace) -> dict[int, float]:
    """Tokens per second of so many sessions together, with the default weights."""
    assert isinstance(engine, OneSpan)
    log("  sessions together")
    found = asyncio.run(sessions.rates(engine.span, WIDTHS, CONTEXTS[0], options.tokens, options.rounds))
    print(f"\n  sessions together, fp16, at {CONTEXTS[0]}: tokens/s of all")
    for width, rate in found.items():
        print(f"    {width:3} sessions {rate:8.1f}   x{rate / found[1]:.2f}")
    return found


def on_gpu(shape: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What spans of a GPU reach: name of the figure -> weights and layers -> figure."""
    result: dict[str, dict[str, float]] = {}
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory(prefix="corolla-engine-") as directory:
        folder = Path(directory)
        log(f"making the {shape} model")
        model = save_llama(folder / shape, SHAPES[shape], dtype, options.device)
        checkpoint = open_checkpoint(str(model))
        for figures in gpu.measure(
            checkpoint,
            device,
            list(GPU_WEIGHTS),
            [min(8, checkpoint.layer_count - 1), checkpoint.layer_count],
            GPU_WIDTHS,
            tokens=options.tokens,
            rounds=options.rounds,
            kernels=folder / "kernels",
        ):
            name = f"{GPU_WEIGHTS[figures.weights]}, {figures.layers} layers"
            print(f"  {name}: {figures.share:.2f} of the rate at which the device copies memory")
            result.setdefault("bytes_vs_copy", {})[name] = round(figures.share, 6)
            for width, rate in figures.rates.items():
                print(f"    {width:3} sessions {rate:8.1f} tokens/s")
                result.setdefault(f"tokens_per_s_{width}", {})[name] = round(rate, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for what a GPU reaches by itself")
    parser.add_argument("--models", help="which of 100m, 1b and 7b, with commas [100m,1b; 7b on a GPU]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each engine in a round")
    parser.add_argument("--threads", type=int, default=default_threads(), help="compute threads of each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device != "cpu":
        print(json.dumps(on_gpu(options.models or "7b", options)))
        return
    print(f"{options.threads} threads of {os.cpu_count()} cores, torch {torch.__version__}")
    if not has_llama_cpp():
        print("llama.cpp takes no part: the bench extra is not installed")
    results = {shape: compare(shape, options) for shape in (options.models or "100m,1b").split(",")}
    keys = next(iter(results.values()))
    print(json.dumps({key: {shape: result[key] for shape, result in results.items()} for key in keys}))


if __name__ == "__main__":
    main()
