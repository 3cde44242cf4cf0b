"""How long a decode message takes through a channel, relayed and direct, and what it costs this process.

Both ends and the relay run in one process on one core, so the processor time is that of all three, and a
round trip holds all of it twice. Compare rows of one run only: hosts differ.

    python -m bench.wire --size 3072 --messages 2000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from contextlib import AsyncExitStack

from relay.app import Relay
from relay.settings import RelaySettings
from shared.channel import Channel, Dialer
from shared.identity import Identity
from shared.protocol import Hop, Path, PeerMessage, Step, Tensor
from shared.relay_client import RelayClient

DIRECT_TIMEOUT_S = 10.0


def decode_step(size: int, position: int) -> Step:
    """A step as it travels in a ring of three: one position of hidden states, and what happened so far."""
    hops = [Hop("ab" * 32, start, start + 8, 0.125, 11.5, "direct") for start in (0, 8)]
    tensor = Tensor("bfloat16", [1, size // 2])
    return Step(session="5e" * 16, epoch=1, position=position, count=1, tensor=tensor, sample=True, hops=hops)


class Echo:
    """One end that sends everything back, and one that waits for it."""

    def __init__(self) -> None:
        self.back: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.received = 0

    async def answer(self, channel: Channel, message: PeerMessage, body: memoryview, path: Path) -> None:
        self.received += 1
        if isinstance(message, Step) and message.sample:
            await channel.send(message, body)

    async def note(self, channel: Channel, message: PeerMessage, body: memoryview, path: Path) -> None:
        self.back.set_result(None)

    async def round_trip(self, channel: Channel, size: int, position: int) -> float:
        self.back = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        await channel.send(decode_step(size, position), bytes(size))
        await self.back
        return (time.perf_counter() - started) * 1000


async def measure(size: int, messages: int, direct: bool) -> dict[str, float | str]:
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(Relay(RelaySettings(port=0)))
        echo = Echo()
        dialers = []
        for handler in (echo.note, echo.answer):
            identity = Identity.generate()
            client = await stack.enter_async_context(RelayClient(relay.url, identity))
            dialers.append(await stack.enter_async_context(Dialer(identity, client, handler, direct=direct)))
        channel = await dialers[0].channel(dialers[1].identity.id)
        if direct:
            async with asyncio.timeout(DIRECT_TIMEOUT_S):
                while {c.path for d in dialers for c in d.channels.values()} != {"direct"}:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        for position in range(100):
            await echo.round_trip(channel, size, position)

        cpu = time.process_time()
        trips = sorted([await echo.round_trip(channel, size, position) for position in range(messages)])
        trip_cpu = (time.process_time() - cpu) / (2 * messages)

        one_way = decode_step(size, 0)
        one_way = Step(session=one_way.session, epoch=1, position=0, count=1, tensor=one_way.tensor)
        echo.received = 0
        body = bytes(size)
        cpu, started = time.process_time(), time.perf_counter()
        for _ in range(messages):
            await channel.send(one_way, body)
        while echo.received < messages:  # noqa: ASYNC110 - the end of a stream, seen from outside
            await asyncio.sleep(0.001)
        elapsed = time.perf_counter() - started
        stream_cpu = (time.process_time() - cpu) / messages
        return {
            "path": channel.path,
            "round_trip_ms": round(statistics.median(trips), 3),
            "round_trip_p99_ms": round(trips[int(len(trips) * 0.99)], 3),
            "cpu_us_per_message": round(trip_cpu * 1e6),
            "stream_messages_per_s": round(messages / elapsed),
            "stream_mb_per_s": round(messages * size / elapsed / 1e6, 1),
            "stream_cpu_us_per_message": round(stream_cpu * 1e6),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=3072, help="bytes of one body")
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--path", choices=["relayed", "direct", "both"], default="both")
    options = parser.parse_args()
    print(f"size {options.size} B, {options.messages} messages, Python {sys.version.split()[0]}, one process")
    results = []
    for path in ("relayed", "direct"):
        if options.path in (path, "both"):
            results.append(asyncio.run(measure(options.size, options.messages, path == "direct")))
            print(results[-1])
    print(json.dumps({"size": options.size, "messages": options.messages, "results": results}))


if __name__ == "__main__":
    main()
