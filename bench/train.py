"""Tokens per second forward and backward through 3 peers, against the unsplit model in one process.

Every party is an OS process on this machine with the same number of compute threads. Both learn a prompt
before the text, so both compute the same: all layers forward, and the gradients of what goes into them. Steps
take turns, round after round. Then a chat is timed with and without a training beside it, in turns too. What
counts is the median. Compare figures of one run only.

    python -m bench.train [--rounds 5] [--batch 4] [--length 128] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.models import random_llama
from bench.one_process import prompt
from peer.remote import RemoteModel
from shared.client.session import Drawn
from tests.harness.processes import ProcessSwarm

SPANS = {"ann": "0:4", "bob": "4:8", "eve": "8:12"}
VIRTUAL = 16
"""Virtual tokens that are learnt."""
MICRO_BATCHES = 2
CHAT_TOKENS = 96
SETTLE = 16
"""Tokens of a chat that are not counted: its prompt is just done."""


def one_process(model: str, threads: int) -> Callable[[torch.Tensor], int]:
    """A step on the unsplit model; gives the bytes that went over a wire."""
    torch.set_num_threads(threads)
    auto: Any = AutoModelForCausalLM
    whole = auto.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    learnt = torch.randn(VIRTUAL, whole.config.hidden_size).mul(0.02).requires_grad_()

    def step(ids: torch.Tensor) -> int:
        embeds = whole.get_input_embeddings()(ids)
        embeds = torch.cat([learnt.expand(len(ids), -1, -1), embeds], 1)
        labels = torch.cat([ids.new_full((len(ids), VIRTUAL), -100), ids], 1)
        torch.autograd.backward(whole(inputs_embeds=embeds, labels=labels).loss)
        return 0

    return step


def through_peers(model: str, relay: str, threads: int) -> Callable[[torch.Tensor], int]:
    """A step through the swarm."""
    torch.set_num_threads(threads)
    remote: Any = RemoteModel.from_swarm(model, relays=[relay])
    remote.new_prompt(VIRTUAL)
    remote.layers.swarm.micro_batches = MICRO_BATCHES
    chain = remote.layers.swarm.chain

    def step(ids: torch.Tensor) -> int:
        before = chain.bytes_sent + chain.bytes_received
        torch.autograd.backward(remote(ids, labels=ids).loss)
        return int(chain.bytes_sent + chain.bytes_received - before)

    return step


def serve(step: Callable[[torch.Tensor], int], batch: int, length: int) -> None:
    """Answer each line of the input with a step's seconds and bytes; after `go on`, run until killed."""
    ids = torch.tensor([prompt(length, 2000)] * batch)
    print("ready", flush=True)
    for line in sys.stdin:
        while True:
            started = time.perf_counter()
            sent = step(ids)
            if line.strip() != "go on":
                break
        print(json.dumps([time.perf_counter() - started, sent]), flush=True)


@asynccontextmanager
async def party(*arguments: str) -> AsyncGenerator[Process, None]:
    """A process of this file that takes steps when it is told."""
    command = [sys.executable, "-m", "bench.train", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if line != b"ready\n":
            raise SystemExit(f"a party of the measurement did not start: {line!r}")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def step(process: Process) -> tuple[float, int]:
    """The seconds and bytes of one step."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"step\n")
    seconds, sent = json.loads(await process.stdout.readline())
    return float(seconds), int(sent)


async def chat_ms(swarm: ProcessSwarm) -> float:
    """The median time between two tokens of a chat."""
    times: list[float] = []
    async with aclosing(swarm.ask(prompt(32, 2000), new=CHAT_TOKENS)) as events:
        async for event in events:
            if isinstance(event, Drawn):
                times.append(time.perf_counter())
    return 1000 * median(after - before for before, after in pairwise(times[SETTLE:]))


async def measure(options: argparse.Namespace) -> dict[str, float]:
    tokens = options.batch * (options.length + VIRTUAL)
    shape = [
        "--batch",
        str(options.batch),
        "--length",
        str(options.length),
        "--threads",
        str(options.threads),
    ]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corolla-bench-")))
        model = random_llama(folder / "model")
        swarm = await stack.enter_async_context(
            ProcessSwarm(model, folder / "swarm", threads=options.threads)
        )
        for name, layers in SPANS.items():
            await swarm.start(name, layers)
        tuner = ["--role", "peers", "--model", str(model), "--relay", swarm.relay_url, *shape]
        alone = ["--role", "one", "--model", str(model), *shape]
        one, three, sent = [], [], 0
        async with party(*alone) as whole, party(*tuner) as split:
            await step(whole)
            await step(split)
            for _ in range(options.rounds):
                one.append((await step(whole))[0])
                seconds, sent = await step(split)
                three.append(seconds)
        quiet, beside = [], []
        await chat_ms(swarm)
        for _ in range(options.rounds):
            quiet.append(await chat_ms(swarm))
            async with party(*tuner) as running:
                await step(running)
                assert running.stdin is not None
                running.stdin.write(b"go on\n")
                await running.stdin.drain()
                beside.append(await chat_ms(swarm))
    return {
        "one_process_tokens_per_s": tokens / median(one),
        "three_peers_tokens_per_s": tokens / median(three),
        "train_ratio_3": median(one) / median(three),
        "bytes_per_token": sent / tokens,
        "chat_ms_alone": median(quiet),
        "chat_ms_beside_training": median(beside),
        "chat_slowdown": median(beside) / median(quiet),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON only")
    parser.add_argument("--role", choices=["one", "peers"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--relay", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "one":
        serve(one_process(options.model, options.threads), options.batch, options.length)
    elif options.role == "peers":
        serve(through_peers(options.model, options.relay, options.threads), options.batch, options.length)
    else:
        figures = asyncio.run(measure(options))
        if not options.json:
            for name, figure in figures.items():
                print(f"{name:28} {figure:12.3f}")
        print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))


if __name__ == "__main__":
    main()
