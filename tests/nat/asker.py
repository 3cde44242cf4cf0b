"""Asks a swarm from a home, as `python -m tests.nat.asker` with the arguments of `Ask`.

Once all hops get their input directly, one long answer is asked for; each of its tokens is a line of JSON.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence

import msgspec
from msgspec import Struct

from shared.client.session import Drawn, Request
from shared.client.swarm_client import SwarmClient
from shared.identity import Identity
from shared.protocol import Path
from tests.shared.channel.ends import until

FIRST_TOKENS = 8
DIRECT_S = 60


class Ask(Struct):
    """What to ask, and what is asked for besides."""

    relay: str
    prompt: list[int]
    new: int
    hops: int


class Drew(Struct):
    """A token, and how its hops got what they computed it from."""

    token: int
    paths: list[Path]


async def main(ask: Ask) -> None:
    async with SwarmClient(Identity.generate(), ask.relay) as swarm:
        await until(lambda: len(swarm.directory.live()) == ask.hops)
        artefact = next(iter(swarm.directory.live())).artefact

        async def answer(new: int) -> AsyncIterator[Drew]:
            request = Request(artefact=artefact, prompt=ask.prompt, max_new_tokens=new)
            async for event in swarm.generate(request):
                if isinstance(event, Drawn):
                    yield Drew(event.token, [hop.path for hop in event.hops])

        async with asyncio.timeout(DIRECT_S):
            while not _all_direct([drew async for drew in answer(FIRST_TOKENS)]):
                pass
        async for drew in answer(ask.new):
            print(msgspec.json.encode(drew).decode(), flush=True)


def _all_direct(answer: Sequence[Drew]) -> bool:
    return set(answer[-1].paths) == {"direct"}


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Ask)))
