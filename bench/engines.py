"""Those who are compared by `bench.engine`: each reads a prompt and then continues it from any position."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from peer.model.checkpoint import open_checkpoint
from peer.model.quantization import choose
from peer.model.quantized_cache import QuantizedCache
from peer.model.span import Span

CPU = torch.device("cpu")

Times = list[tuple[float, float]]
"""For each token or prompt: milliseconds of the wall clock, and of all cores together."""


class Engine(Protocol):
    """Someone who computes a model. Positions are those of one conversation."""

    def read(self, prompt: list[int], position: int) -> Times: ...

    def continue_from(self, position: int, count: int) -> Times: ...


class Clock:
    """Notes times; also a streamer for transformers' generation."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self, *_: object) -> None:
        self._marks.append((time.perf_counter() * 1000, time.process_time() * 1000))

    put = mark

    def end(self) -> None:
        """Nothing is held back."""

    def times(self, first: int = 0) -> Times:
        return [
            (after[0] - before[0], after[1] - before[1]) for before, after in pairwise(self._marks[first:])
        ]


class OneSpan:
    """All layers in one span of ours."""

    def __init__(self, model: Path, quantize: str, cache: Path, context: int) -> None:
        quantization = choose(quantize, torch.float32, CPU, cache / "kernels")
        checkpoint = open_checkpoint(str(model))
        kept = QuantizedCache(cache / f"{model.name}-{quantize}")
        self.span = Span.load(
            checkpoint, 0, checkpoint.layer_count, quantization=quantization, quantized=kept
        )
        self._cache = self.span.new_cache(0, checkpoint.layer_count, context)

    def read(self, prompt: list[int], position: int) -> Times:
        clock = Clock()
        clock.mark()
        self.span.forward(torch.tensor([prompt]), self._cache, position)
        clock.mark()
        return clock.times()

    def continue_from(self, position: int, count: int) -> Times:
        clock = Clock()
        token = 1
        for step in range(count + 1):
            row = self.span.row(torch.tensor([[token]]), self._cache, position + step)
            (logits,) = self.span.forward_rows([row])
            assert logits is not None
            token = int(logits.argmax())
            clock.mark()
        return clock.times()


class Transformers:
    """transformers' own generation, with the cache that it takes by itself or a static one."""

    def __init__(self, model: Any, cache: DynamicCache | StaticCache) -> None:  # noqa: ANN401
        self._model = model
        self._cache = cache

    def read(self, prompt: list[int], position: int) -> Times:
        """Fills the cache with any numbers: how long a token takes does not depend on them."""
        config = self._model.config
        width = config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, len(prompt), width)
        for layer in range(config.num_hidden_layers):
            self._cache.update(torch.randn(shape), torch.randn(shape), layer)
        return []

    def continue_from(self, position: int, count: int) -> Times:
        if isinstance(self._cache, StaticCache):
            static: Any = self._cache
            for layer in static.layers:
                layer.cumulative_length.fill_(position)
        elif surplus := self._cache.get_seq_length() - position:
            self._cache.crop(-surplus)
        clock = Clock()
        inputs = torch.ones(1, position + 1, dtype=torch.int64)
        self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=self._cache,
            max_new_tokens=count + 1,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        # The prompt comes first, then each token.
        return clock.times(first=1)


def transformers_engines(model: Path, context: int) -> dict[str, Engine]:
    """With both caches, over one copy of the weights."""
    auto: Any = AutoModelForCausalLM
    whole = auto.from_pretrained(model, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None
    static = StaticCache(config=whole.config, max_cache_len=context)
    return {
        "transformers": Transformers(whole, DynamicCache(config=whole.config)),
        "transformers, static cache": Transformers(whole, static),
    }


class LlamaCpp:
    """llama.cpp on a GGUF file."""

    def __init__(self, file: Path, threads: int, context: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def read(self, prompt: list[int], position: int) -> Times:
        self._llama.n_tokens = position
        clock = Clock()
        clock.mark()
        self._llama.eval(prompt)
        clock.mark()
        return clock.times()

    def continue_from(self, position: int, count: int) -> Times:
        self._llama.n_tokens = position
        clock = Clock()
        for _ in range(count + 1):
            # Which token comes is of no matter to it; taking the largest logit costs us and not it.
            self._llama.eval([1])
            clock.mark()
        return clock.times()
