"""How long an answer stands still when a hop goes away: with a standby, and with a replay to a new peer.

Relay and peers are OS processes on this machine. Three peers hold a third of the model each; a fourth one
holds the middle too. In mid-answer the middle hop is killed (its connections close) or stopped by SIGSTOP (it
falls silent). The stall is the longest time between two tokens from then on; every token is compared with the
unsplit model's. The JSON has the worst stall over both lengths of context.

    python -m bench.recovery [--runs 5] [--threads 1] [--demo]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Literal

from bench.models import random_llama
from bench.one_process import prompt
from peer.settings import DEMO_MODEL
from shared.client.session import CLOSE, Drawn, Rerouted
from tests.harness.processes import ProcessSwarm
from tests.harness.swarm import reference

CONTEXTS = (128, 1024)
WARM_UP_TOKENS = 70
MOST_TOKENS = 300
EARLIEST = 20
"""Tokens before a hop goes away, so that the asker knows what a step usually takes."""
AFTER = 12
"""Tokens that are still awaited afterwards."""
Loss = Literal["closed", "frozen"]
Way = Literal["standby", "replay"]


@dataclass
class Stalls:
    """What the runs of one kind gave."""

    longest_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    wrong_tokens: int = 0
    ways: list[str] = field(default_factory=list)

    def row(self) -> str:
        ways = ", ".join(f"{self.ways.count(way)} {way}" for way in sorted(set(self.ways)))
        return (
            f"median {median(self.longest_ms):6.0f} ms   worst {max(self.longest_ms):6.0f} ms"
            f"   a step takes {median(self.step_ms):5.1f} ms   ({ways})"
        )


class Bench:
    """A swarm with two peers for the middle, one of which goes away again and again."""

    def __init__(self, swarm: ProcessSwarm) -> None:
        self.swarm = swarm
        self._numbers = count(1)

    async def prepare(self, ids: list[int]) -> None:
        await asyncio.gather(self.swarm.start("first", "1/3"), self.swarm.start("last", "3/3"))
        await self.refill()
        # Direct paths open meanwhile, and buffers grow.
        async with aclosing(self.swarm.ask(ids, new=WARM_UP_TOKENS)) as answer:
            async for _ in answer:
                pass

    async def refill(self) -> None:
        """Have two peers for the middle."""
        missing = 2 - sum(name.startswith("middle") for name in self.swarm.serving())
        names = [f"middle-{next(self._numbers)}" for _ in range(missing)]
        await asyncio.gather(*(self.swarm.start(name, "2/3") for name in names))

    async def run(self, loss: Loss, way: Way, ids: list[int], expected: list[int], into: Stalls) -> None:
        """One answer during which the middle hop goes away."""
        await self.refill()
        self.swarm.client.standbys = way == "standby"
        times: list[float] = []
        tokens: list[int] = []
        gone_at = 0
        victim = ""
        async with aclosing(self.swarm.ask(ids, new=MOST_TOKENS)) as answer:
            async for event in answer:
                if isinstance(event, Rerouted):
                    into.ways.append(f"{event.reason}{' to a standby' if event.stood_by else ''}")
                    continue
                times.append(time.perf_counter())
                tokens.append(event.token)
                if not gone_at and self._may_go(way, len(tokens)):
                    victim = self._take_away(event, loss)
                    gone_at = len(tokens)
                if gone_at and len(tokens) >= gone_at + AFTER:
                    break
        gaps = [(after - before) * 1000 for before, after in pairwise(times)]
        into.longest_ms.append(max(gaps[gone_at - 1 :]))
        into.step_ms.append(median(gaps[: gone_at - 1]))
        into.wrong_tokens += sum(one != other for one, other in zip(tokens, expected, strict=False))
        await self._end(victim)

    def _may_go(self, way: Way, tokens: int) -> bool:
        if tokens + AFTER + 1 >= MOST_TOKENS:
            raise SystemExit("nobody came to stand by; is the machine too busy?")
        if tokens < EARLIEST:
            return False
        lags = [lag for name, lag in self.swarm.behind().items() if name.startswith("middle")]
        return way == "replay" or any(lag < CLOSE for lag in lags)

    def _take_away(self, event: Drawn, loss: Loss) -> str:
        name = self.swarm.name(event.hops[1].peer)
        number = signal.SIGKILL if loss == "closed" else signal.SIGSTOP
        os.kill(self.swarm.children[name].process.pid, number)
        return name

    async def _end(self, name: str) -> None:
        process = self.swarm.children[name].process
        if process.returncode is None:
            process.kill()
        await process.wait()
        await self.swarm.until(lambda: name not in self.swarm.serving())


async def measure(model: Path, options: argparse.Namespace) -> dict[tuple[Loss, Way, int], Stalls]:
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    texts = {length: prompt(length, vocabulary) for length in CONTEXTS}
    expected = {length: reference(model, ids, MOST_TOKENS) for length, ids in texts.items()}
    results: dict[tuple[Loss, Way, int], Stalls] = defaultdict(Stalls)
    with tempfile.TemporaryDirectory(prefix="corolla-bench-") as folder:
        async with ProcessSwarm(model, Path(folder), threads=options.threads) as swarm:
            bench = Bench(swarm)
            await bench.prepare(texts[CONTEXTS[0]])
            losses: tuple[Loss, Loss] = ("closed", "frozen")
            ways: tuple[Way, Way] = ("standby", "replay")
            for number in range(options.runs):
                print(f"run {number + 1} of {options.runs}", file=sys.stderr, flush=True)
                # In turn, so that a busy machine is busy for all of them.
                for length in CONTEXTS:
                    for loss in losses:
                        for way in ways:
                            stalls = results[loss, way, length]
                            await bench.run(loss, way, texts[length], expected[length], stalls)
                            print(f"  {loss} {way} {length}: {stalls.row()}", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of each process")
    parser.add_argument("--demo", action="store_true", help="the demo model in place of a random Llama")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corolla-model-") as folder:
        model = Path(DEMO_MODEL) if options.demo else random_llama(Path(folder))
        results = asyncio.run(measure(model, options))
    name = "demo model" if options.demo else "random Llama of 110M"
    print(
        f"{options.runs} runs of each kind, {name}, float32, "
        f"{options.threads} threads, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    for (loss, way, length), stalls in sorted(results.items()):
        print(f"{loss:6}  {way:7}  {length:5} tokens   {stalls.row()}")
    worst = {
        f"{loss}_{way}_ms": round(
            max(max(stalls.longest_ms) for key, stalls in results.items() if key[:2] == (loss, way)), 1
        )
        for loss in ("closed", "frozen")
        for way in ("standby", "replay")
    }
    wrong = sum(stalls.wrong_tokens for stalls in results.values())
    runs = sum(len(stalls.longest_ms) for stalls in results.values())
    print(json.dumps({**worst, "wrong_tokens": wrong, "runs": runs}))


if __name__ == "__main__":
    main()
