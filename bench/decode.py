"""Tokens per second through 1, 2 and 3 peers, against transformers' own generation in one process.

Every party is an OS process on this machine with the same number of compute threads; peers talk through real
channels. The four are asked in turn, round after round, so that a busy machine is busy for all of them; what
counts is the median over all intervals between tokens. Compare figures of one run only.

    python -m bench.decode [--tokens 64] [--rounds 5] [--threads 1] [--relay-only]
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
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench.models import random_llama
from bench.one_process import prompt
from peer.settings import DEMO_MODEL
from shared.client.session import Drawn
from tests.harness.processes import ProcessSwarm

PEERS = (1, 2, 3)
WARM_UP_TOKENS = 70
"""Past the first growth of the caches and the credit that an answer starts with."""
ONE_PROCESS = "one process"


@dataclass
class Measured:
    """One party's intervals between tokens, and what its hops said of themselves, over all rounds."""

    intervals_ms: list[float] = field(default_factory=list)
    computed_ms: list[list[float]] = field(default_factory=list)
    """For each token, the milliseconds of each hop."""
    waited_ms: list[list[float]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    @property
    def tokens_per_s(self) -> float:
        return 1000 / median(self.intervals_ms)

    @property
    def hop_overhead_ms(self) -> float:
        """What a hop costs beyond its computation: the wire, the queues and the hand-overs, in the median."""
        beyond = [
            (interval - sum(computed)) / len(computed)
            for interval, computed in zip(self.intervals_ms, self.computed_ms, strict=True)
        ]
        return median(beyond)


@asynccontextmanager
async def yardstick(model: Path, threads: int) -> AsyncGenerator[Process, None]:
    """The process of `bench.one_process`, ready to be asked."""
    command = [sys.executable, "-m", "bench.one_process", str(model), str(threads)]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        await process.wait()


async def ask_one_process(process: Process, prompt_tokens: int, new_tokens: int, into: Measured) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{prompt_tokens} {new_tokens}\n".encode())
    into.intervals_ms += json.loads(await process.stdout.readline())


async def ask_swarm(swarm: ProcessSwarm, ids: list[int], new_tokens: int, into: Measured) -> None:
    times: list[float] = []
    drawn: list[Drawn] = []
    async with aclosing(swarm.ask(ids, new=new_tokens)) as events:
        async for event in events:
            if isinstance(event, Drawn):
                times.append(time.perf_counter())
                drawn.append(event)
    into.intervals_ms += [(after - before) * 1000 for before, after in pairwise(times)]
    into.computed_ms += [[hop.computed_ms for hop in token.hops] for token in drawn[1:]]
    into.waited_ms += [[hop.waited_ms for hop in token.hops] for token in drawn[1:]]
    into.paths |= {hop.path for token in drawn[1:] for hop in token.hops}


async def until_direct(swarm: ProcessSwarm, ids: list[int]) -> None:
    """Ask until no hop is relayed any more, so that the figures are those of one path."""
    for _ in range(20):
        paths = Measured()
        await ask_swarm(swarm, ids, WARM_UP_TOKENS, paths)
        if "relayed" not in paths.paths:
            return
    raise SystemExit("the peers found no direct path to each other; measure with --relay-only")


async def measure(model: Path, options: argparse.Namespace) -> dict[str, Measured]:
    ids = prompt(options.prompt, json.loads((model / "config.json").read_text())["vocab_size"])
    results = {ONE_PROCESS: Measured(), **{_peers(count): Measured() for count in PEERS}}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corolla-bench-")))
        process = await stack.enter_async_context(yardstick(model, options.threads))
        await ask_one_process(process, options.prompt, WARM_UP_TOKENS, Measured())
        swarms: dict[str, ProcessSwarm] = {}
        for count in PEERS:
            swarm = ProcessSwarm(
                model, folder / str(count), threads=options.threads, direct=not options.relay_only
            )
            swarms[_peers(count)] = await stack.enter_async_context(swarm)
            for part in range(1, count + 1):
                await swarm.start(f"peer-{part}", f"{part}/{count}")
            if options.relay_only:
                await ask_swarm(swarm, ids, WARM_UP_TOKENS, Measured())
            else:
                await until_direct(swarm, ids)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            await ask_one_process(process, options.prompt, options.tokens, results[ONE_PROCESS])
            for name, swarm in swarms.items():
                await ask_swarm(swarm, ids, options.tokens, results[name])
    return results


def _peers(count: int) -> str:
    return "1 peer" if count == 1 else f"{count} peers"


def show(title: str, results: dict[str, Measured]) -> None:
    """A row for each party, and below it where the time of a token goes, hop by hop."""
    base = results[ONE_PROCESS].tokens_per_s
    print(f"\n{title}")
    for name, measured in results.items():
        print(f"  {name:12} {measured.tokens_per_s:8.1f} tokens/s   x{measured.tokens_per_s / base:.2f}")
        if measured.computed_ms:
            hops = ", ".join(
                f"{median(computed):.2f} + {median(waited):.2f}"
                for computed, waited in zip(
                    zip(*measured.computed_ms, strict=True),
                    zip(*measured.waited_ms, strict=True),
                    strict=True,
                )
            )
            paths = "/".join(sorted(measured.paths))
            print(f"               {paths}; each hop computes + waits: {hops} ms")
            print(f"               beyond computing: {measured.hop_overhead_ms:.2f} ms a hop")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="compute threads of each process")
    parser.add_argument("--relay-only", action="store_true", help="open no direct paths")
    options = parser.parse_args()
    print(
        f"{options.rounds} rounds of {options.tokens} tokens after a prompt of {options.prompt}, float32, "
        f"{options.threads} threads, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{'relayed' if options.relay_only else 'direct'} channels"
    )
    with tempfile.TemporaryDirectory(prefix="corolla-model-") as folder:
        large_model = random_llama(Path(folder))
        demo = asyncio.run(measure(Path(DEMO_MODEL), options))
        show("demo model", demo)
        large = asyncio.run(measure(large_model, options))
        show("random Llama of 110M parameters", large)
    rates = {name: round(measured.tokens_per_s, 2) for name, measured in large.items()}
    print(
        json.dumps(
            {
                "one_process": rates[ONE_PROCESS],
                "peers_1": rates[_peers(1)],
                "peers_2": rates[_peers(2)],
                "peers_3": rates[_peers(3)],
                "ratio_3": round(rates[_peers(3)] / rates[ONE_PROCESS], 3),
                "hop_overhead_ms": round(large[_peers(3)].hop_overhead_ms, 3),
                "demo": {name: round(measured.tokens_per_s, 2) for name, measured in demo.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
