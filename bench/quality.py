"""What rounding the weights costs: loss on a text, and how often the likeliest token stays the same.

The demo model reads conversations of the kind it learned, drawn with a seed; a random model reads random
tokens, and its loss says little but that it did not change. `moved` is the mean Kullback-Leibler divergence
from full precision, in nats per token. Tokens are read, not generated: one that is exchanged does not change
the text that follows.

    python -m bench.quality [--tokens 4096] [--quantize fp16,int8,int8-fast,int4,nf4]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from bench.models import random_llama
from peer.demo.topics import compose, read_text
from peer.model.checkpoint import open_checkpoint
from peer.model.quantization import choose
from peer.model.span import Span
from peer.settings import DEMO_MODEL

ROW = 256
"""Tokens that are read in one piece."""


@dataclass(frozen=True)
class Quality:
    """Over all tokens of a text. Losses in nats per token."""

    loss: float
    same: float
    """Share of positions whose likeliest token is that of full precision."""
    moved: float
    weights_mb: float


def conversations() -> Iterator[list[int]]:
    """Rows of the demo model's text: conversations one after another, as its chat template writes them."""
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(DEMO_MODEL)
    text, draws = read_text(), random.Random(7)
    ids: list[int] = []
    while True:
        ids += tokenizer.apply_chat_template(compose(text, draws, turns=3))["input_ids"]
        while len(ids) >= ROW:
            yield ids[:ROW]
            ids = ids[ROW:]


def random_rows(vocabulary: int) -> Iterator[list[int]]:
    draws = random.Random(7)
    while True:
        yield [draws.randrange(vocabulary) for _ in range(ROW)]


def log_odds(span: Span, row: list[int]) -> torch.Tensor:
    """Logarithms of the probabilities [count, vocab] of what follows each token."""
    cache = span.new_cache(0, span.layer_count, ROW)
    logits = span.forward(torch.tensor([row]), cache, 0, all_logits=True)
    return nn.functional.log_softmax(logits[0], dim=-1)


@torch.inference_mode()
def compare(span: Span, exact: Span, rows: list[list[int]]) -> Quality:
    """Read the rows with both."""
    losses, same, moved = [], [], []
    for row in rows:
        odds, expected = log_odds(span, row), log_odds(exact, row)
        losses.append(nn.functional.nll_loss(odds[:-1], torch.tensor(row[1:])))
        same.append((odds.argmax(1) == expected.argmax(1)).float().mean())
        moved.append((expected.exp() * (expected - odds)).sum(1).mean())
    loss, alike, distance = (float(torch.stack(numbers).mean()) for numbers in (losses, same, moved))
    return Quality(loss, alike, distance, span.weights_bytes / 1e6)


def measure(model: Path, names: list[str], rows: list[list[int]]) -> dict[str, Quality]:
    """Each quantization beside full precision, which comes first."""
    cpu, checkpoint = torch.device("cpu"), open_checkpoint(str(model))
    found: dict[str, Quality] = {}
    with tempfile.TemporaryDirectory(prefix="corolla-kernels-") as kernels:

        def load(name: str) -> Span:
            quantization = choose(name, torch.float32, cpu, Path(kernels))
            return Span.load(checkpoint, 0, checkpoint.layer_count, quantization=quantization)

        exact = load("none")
        for name in ["none", *names]:
            found[name] = compare(load(name), exact, rows)
    return found


def show(title: str, found: dict[str, Quality]) -> None:
    print(f"\n{title}\n  {'':10} {'loss':>8} {'same token':>12} {'moved':>10} {'MB':>8}")
    for name, one in found.items():
        print(f"  {name:10} {one.loss:8.4f} {one.same:12.2%} {one.moved:10.2e} {one.weights_mb:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of the demo model's text")
    parser.add_argument("--random-tokens", type=int, default=1024, help="of the random model's")
    parser.add_argument("--quantize", default="fp16,int8,int8-fast,int4,nf4", help="which, with commas")
    options = parser.parse_args()
    names = options.quantize.split(",")
    rows = list(islice(conversations(), options.tokens // ROW))
    demo = measure(Path(DEMO_MODEL), names, rows)
    show(f"demo model, {len(rows) * ROW} tokens of its conversations", demo)
    with tempfile.TemporaryDirectory(prefix="corolla-model-") as folder:
        model = random_llama(Path(folder))
        rows = list(islice(random_rows(32000), options.random_tokens // ROW))
        large = measure(model, names, rows)
    show(f"random Llama of 110M parameters, {len(rows) * ROW} random tokens", large)
    print(
        json.dumps(
            {
                title: {
                    name: {"loss": round(one.loss, 5), "same": round(one.same, 5)}
                    for name, one in found.items()
                }
                for title, found in (("demo", demo), ("random", large))
            }
        )
    )


if __name__ == "__main__":
    main()
