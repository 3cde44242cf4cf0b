"""The yardstick: transformers' own greedy generation of the unsplit model, in a process of its own.

`python -m bench.one_process MODEL THREADS` reads lines of `PROMPT_TOKENS NEW_TOKENS` from its input and
answers each with the milliseconds between its new tokens, as one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Clock:
    """A streamer that notes when each token was there. The first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def intervals_ms(model: Any, prompt_tokens: int, new_tokens: int) -> list[float]:  # noqa: ANN401
    clock = Clock()
    ids = prompt(prompt_tokens, int(model.config.vocab_size))
    inputs = torch.tensor([ids])
    model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    return [(after - before) * 1000 for before, after in pairwise(clock.times[1:])]


def prompt(count: int, vocabulary: int) -> list[int]:
    """The same ids for everyone who measures."""
    return [(7919 * place + 17) % vocabulary for place in range(count)]


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    print("ready", flush=True)
    for line in sys.stdin:
        prompt_tokens, new_tokens = (int(word) for word in line.split())
        print(json.dumps(intervals_ms(model, prompt_tokens, new_tokens)), flush=True)


if __name__ == "__main__":
    main()
