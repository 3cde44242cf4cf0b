"""A participant's relays as one: it stays connected to each, and any of them may go away meanwhile.

What relays show is merged by the directory, channels are carried by the dialer; this file only keeps the
connections, says everything on each of them, and knows which is home: the one that answers fastest.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from shared.errors import ConnectionLost, RelayUnreachable
from shared.identity import Identity
from shared.protocol import SignedRecord
from shared.relay_client import RelayClient

log = logging.getLogger(__name__)

ANNOUNCE_TIMEOUT_S = 2.0
"""A relay that does not read holds an announcement up no longer; the next renewal tries it again."""


class Relays:
    """`async with Relays(["https://a.example", "https://b.example"], identity) as relays`.

    Entering needs one relay that lets us in; the others are tried for as long as it lasts. Raises
    RelayUnreachable, or with a single relay whatever kept us out.
    """

    def __init__(self, urls: str | Sequence[str], identity: Identity) -> None:
        urls = [urls] if isinstance(urls, str) else list(urls)
        self.clients = [RelayClient(url, identity, patient=len(urls) > 1) for url in urls]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for client in self.clients:
                await stack.enter_async_context(client)
            await self._first_answer()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def __iter__(self) -> Iterator[RelayClient]:
        """Home first, then the other connected ones by their round trip, then those that are away."""
        return iter(sorted(self.clients, key=_distance))

    @property
    def home(self) -> RelayClient:
        """The connected relay that answers fastest."""
        return next(iter(self))

    @property
    def connected_urls(self) -> list[str]:
        """What a peer announces of them: where it can be met, home first."""
        return [client.url for client in self if client.connected.is_set()]

    async def announce(self, record: SignedRecord) -> None:
        """Publish a signed announcement on every relay, now or as soon as it is back."""
        await asyncio.gather(*(_announce(client, record) for client in self.clients))

    async def _first_answer(self) -> None:
        """Wait until one relay has let us in. Raises RelayUnreachable when all have failed."""
        attempts = [asyncio.create_task(client.attempted.wait()) for client in self.clients]
        try:
            for attempt in asyncio.as_completed(attempts):
                await attempt
                if any(client.connected.is_set() for client in self.clients):
                    return
        finally:
            for task in attempts:
                task.cancel()
        reasons = "; ".join(str(client.error) for client in self.clients)
        raise RelayUnreachable(f"none of the {len(self.clients)} relays lets us in: {reasons}")


async def _announce(client: RelayClient, record: SignedRecord) -> None:
    try:
        async with asyncio.timeout(ANNOUNCE_TIMEOUT_S):
            await client.announce(record)
    except ConnectionLost:
        log.debug("%s hears of us when it is back", client.url)
    except TimeoutError:
        log.warning("the relay at %s does not take our announcement", client.url)


def _distance(client: RelayClient) -> float:
    return client.login_ms or 0.0 if client.connected.is_set() else math.inf
