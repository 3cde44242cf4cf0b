"""What the gateway adds: 200 clients that stream at once, and what a kept prefix saves before a first token.

The gateway is a process of its own before a made-up swarm that draws a token for each answer at a steady pace
and writes into the token's record when it did; the clients are this process. What is added to a token is the
time from that moment until its client has read it: both read the same clock. How much the gateway's memory
grows is measured over the same time, which begins after two answers to each client.

Time to the first token is measured with true peers, through the gateway: a question that begins like the one
before it, and in turn one of the same length that does not.

    python -m bench.gateway [--clients 200] [--tokens 64] [--pace-ms 100] [--seconds 30]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import re
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles

import aiohttp
import msgspec
import orjson

from bench.models import random_llama
from shared import event_loop
from shared.background import Background
from shared.client.session import Drawn, Request, Rerouted
from tests.harness.fake_swarm import FakeSwarm
from tests.harness.swarm import Swarm
from web.app import Gateway, GatewaySettings

QUESTIONS = 5
"""Of each kind, for the time to the first token."""
LAYERS = 4
FOLLOWS = 32
"""Tokens of a question behind the beginning that it shares."""


# ---------------------------------------------------------------- the gateway's own process


class PacedSwarm(FakeSwarm):
    """Draws at a steady pace for everyone; the first hop of a token says when, in milliseconds."""

    def __init__(self, pace_s: float) -> None:
        super().__init__()
        self._pace_s = pace_s
        self.serve("paced", context=1 << 20, ann=(0, 2), bob=(2, 4))

    async def generate(
        self, request: Request, opened: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Drawn | Rerouted, None]:
        opened()
        token = self.tokenizer.encode("a").ids[0]
        first, *others = self._hops(request)
        next_at = time.monotonic() + random.random() * self._pace_s
        start = len(request.prompt)
        for position in range(start, start + request.max_new_tokens):
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            next_at += self._pace_s
            drawn_at = msgspec.structs.replace(first, waited_ms=time.monotonic() * 1000)
            yield Drawn(position, token, [drawn_at, *others], False)


async def serve(pace_s: float) -> None:
    """Until the parent ends it."""
    async with Gateway(GatewaySettings(), PacedSwarm(pace_s)) as gateway:
        print(gateway.url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@asynccontextmanager
async def gateway_process(pace_s: float) -> AsyncGenerator[tuple[str, Process]]:
    command = (sys.executable, "-m", "bench.gateway", "--serve", str(pace_s))
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip(), process
    finally:
        process.stdin.close()
        await process.wait()


def resident_mb(process: Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


# ---------------------------------------------------------------- added latency


async def stream_one(http: aiohttp.ClientSession, tokens: int, added_ms: list[float]) -> None:
    body = {
        "model": "paced",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": tokens,
        "stream": True,
        "swarm": {"route": True},
    }
    async with http.post("/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            read_at = time.monotonic() * 1000
            if line.startswith(b"data: {"):
                for token in orjson.loads(line[6:]).get("swarm", {}).get("tokens", []):
                    added_ms.append(read_at - token["hops"][0]["waited_ms"])


async def chat_on(http: aiohttp.ClientSession, tokens: int, pace_s: float, added_ms: list[float]) -> None:
    """One question after another, as people do: not all of them at the same moment."""
    await asyncio.sleep(random.random() * tokens * pace_s)
    while True:
        await stream_one(http, tokens, added_ms)


async def measure_added(options: argparse.Namespace) -> tuple[list[float], float]:
    """Milliseconds added to each token after the warm-up, and by how much the gateway's memory grew since."""
    added_ms: list[float] = []
    pace_s = options.pace_ms / 1000
    async with (
        gateway_process(pace_s) as (url, process),
        aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as http,
        Background() as clients,
    ):
        for _ in range(options.clients):
            clients.start(chat_on(http, options.tokens, pace_s, added_ms))
        await asyncio.sleep(2 * options.tokens * pace_s)
        gc.freeze()  # else this process stops now and then to look through all that torch has made
        added_ms.clear()
        before_mb = resident_mb(process)
        await asyncio.sleep(options.seconds)
        return list(added_ms), resident_mb(process) - before_mb


# ---------------------------------------------------------------- time to the first token


async def first_token_s(http: aiohttp.ClientSession, model: str, prompt: Sequence[int]) -> float:
    body = {"model": model, "prompt": list(prompt), "max_tokens": 2, "temperature": 0, "stream": True}
    started = time.perf_counter()
    async with http.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        await response.content.readline()
        took = time.perf_counter() - started
        await response.read()
    return took


async def measure_first_tokens(length: int) -> tuple[float, float]:
    """Seconds with and without a beginning that was computed before, in the median."""
    with tempfile.TemporaryDirectory(prefix="corolla-bench-") as folder:
        model = random_llama(Path(folder, "llama"), num_hidden_layers=LAYERS)
        async with Swarm(model) as swarm:
            await swarm.start(ann=(0, LAYERS // 2), bob=(LAYERS // 2, LAYERS))
            async with (
                Gateway(GatewaySettings(data_dir=Path(folder, "data")), swarm.client) as gateway,
                aiohttp.ClientSession(gateway.url, timeout=aiohttp.ClientTimeout(600)) as http,
            ):
                return await ask_in_turn(http, swarm.artefact, length)


async def ask_in_turn(http: aiohttp.ClientSession, model: str, length: int) -> tuple[float, float]:
    def tokens(count: int) -> list[int]:
        return [random.randrange(10, 2000) for _ in range(count)]

    again_s: list[float] = []
    anew_s: list[float] = []
    for _ in range(QUESTIONS + 1):
        beginning = tokens(length)
        anew_s.append(await first_token_s(http, model, beginning + tokens(FOLLOWS)))
        again_s.append(await first_token_s(http, model, beginning + tokens(FOLLOWS)))
    return median(again_s[1:]), median(anew_s[1:])  # the first of each loads the tokenizer


# ---------------------------------------------------------------- telling


async def measure(options: argparse.Namespace) -> dict[str, float]:
    added_ms, growth_mb = await measure_added(options)
    cuts = quantiles(added_ms, n=100)
    again_s, anew_s = await measure_first_tokens(options.prompt)
    return {
        "clients": options.clients,
        "tokens": len(added_ms),
        "added_ms_p50": round(cuts[49], 3),
        "added_ms_p99": round(cuts[98], 3),
        "rss_growth_mb": round(growth_mb, 2),
        "ttft_reuse_s": round(again_s, 4),
        "ttft_anew_s": round(anew_s, 4),
        "ttft_reuse_ratio": round(again_s / anew_s, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--pace-ms", type=float, default=100.0, help="between two tokens of an answer")
    parser.add_argument("--seconds", type=float, default=30.0, help="after the warm-up of two answers")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens that two questions share")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        event_loop.run(serve(options.serve))
        return
    print(json.dumps(event_loop.run(measure(options))))


if __name__ == "__main__":
    main()
