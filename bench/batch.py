"""Tokens per second of 1, 4 and 16 sessions together, through one span that holds a whole model.

The sessions go through the batcher and its thread as those of a peer do; there is no network. The widths take
turns, round after round, so that a busy machine is busy for all of them; what counts is the median. Every
session begins behind a prompt of `--context` positions. Compare figures of one run only.

    python -m bench.batch [--models 100m,1b] [--layers 22] [--tokens 16] [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from bench.models import SHAPES, random_llama
from bench.one_process import prompt
from peer.model.checkpoint import open_checkpoint
from peer.model.kv_cache import KVCache
from peer.model.quantization import choose
from peer.model.span import Span
from peer.serving.batcher import Batcher
from peer.serving.compute import Draw
from peer.serving.executor import Executor
from shared.background import Background
from shared.protocol import Sampling, Step, Tensor

WIDTHS = (1, 4, 16)
GREEDY = Draw(Sampling(), [], 0)


class Chat:
    """A session that draws one token after another."""

    def __init__(self, number: int, batcher: Batcher, cache: KVCache) -> None:
        self._session = f"{number:032x}"
        self._batcher = batcher
        self._cache = cache
        self._token = 0

    async def feed(self, tokens: Sequence[int]) -> None:
        step = Step(
            session=self._session,
            epoch=0,
            position=self._cache.length,
            count=len(tokens),
            tensor=Tensor("int32", [len(tokens)]),
        )
        computed = await self._batcher.compute(self._cache, step, array("i", tokens).tobytes(), GREEDY)
        assert computed.token is not None
        self._token = computed.token

    async def draw(self, count: int) -> None:
        for _ in range(count):
            await self.feed([self._token])


async def measure(span: Span, options: argparse.Namespace) -> dict[int, list[float]]:
    """Tokens per second of all sessions of a width together, for each round."""
    rates: dict[int, list[float]] = {width: [] for width in WIDTHS}
    capacity = options.context + 1 + options.tokens * (options.rounds + 1)
    async with Executor() as executor, Background() as tasks:
        batcher = Batcher(span, executor)
        tasks.start(batcher.run())
        groups = {
            width: [
                Chat(number, batcher, span.new_cache(0, span.layer_count, capacity))
                for number in range(width)
            ]
            for width in WIDTHS
        }
        ids = prompt(options.context, span.vocab_size)
        for width, chats in groups.items():
            await asyncio.gather(*(chat.feed(ids[number:]) for number, chat in enumerate(chats)))
            await asyncio.gather(*(chat.draw(2) for chat in chats))
            print(f"{width} sessions are ready", file=sys.stderr, flush=True)
        for _ in range(options.rounds):
            for width, chats in groups.items():
                began = time.perf_counter()
                await asyncio.gather(*(chat.draw(options.tokens) for chat in chats))
                rates[width].append(width * options.tokens / (time.perf_counter() - began))
    return rates


def load(name: str, folder: Path, layers: int | None, quantize: str) -> Span:
    shape = dict(SHAPES[name])
    if layers is not None:
        shape["num_hidden_layers"] = layers
    checkpoint = open_checkpoint(str(random_llama(folder / name, **shape)))
    quantization = choose(quantize, torch.float32, torch.device("cpu"), folder / "kernels")
    return Span.load(checkpoint, 0, checkpoint.layer_count, quantization=quantization)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(SHAPES), help="100m, 1b or both")
    parser.add_argument("--layers", type=int, help="fewer layers, for a short run")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each session and round")
    parser.add_argument("--context", type=int, default=128, help="positions that each session begins with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantize", default="auto", help="as a peer's: auto, none, int8, int8-fast or int4")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{options.rounds} rounds of {options.tokens} tokens behind {options.context} positions, "
        f"weights {options.quantize}, {options.threads} threads, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="corolla-batch-") as folder:
        for name in options.models.split(","):
            span = load(name, Path(folder), options.layers, options.quantize)
            rates = {width: median(each) for width, each in asyncio.run(measure(span, options)).items()}
            for width, rate in rates.items():
                result.setdefault(f"batch{width}_tokens_per_s", {})[name] = round(rate, 2)
                print(f"  {name} {width:3} sessions {rate:8.1f} tokens/s   x{rate / rates[1]:.2f}")
            result.setdefault("batch16_vs_1", {})[name] = round(rates[16] / rates[1], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
