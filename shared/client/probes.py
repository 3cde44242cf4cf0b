"""Ask peers how busy they are, and remember for some seconds what they said."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from shared.channel import Channel, Priority
from shared.errors import ConnectionLost
from shared.identity import PeerId
from shared.protocol import Load, Probe

PROBE_S = 0.15
"""How long a session waits for answers before it opens; whoever says nothing counts as it was announced."""
FRESH_S = 3.0
"""So long an answer counts more than the announcement."""


class Probes:
    """`ask` peers, then read `loads`; give every `Load` that arrives to `heard`. `dial` gives channels."""

    def __init__(
        self, dial: Callable[[PeerId], Awaitable[Channel]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._dial = dial
        self._clock = clock
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[PeerId, asyncio.Event]] = {}
        self._loads: dict[PeerId, tuple[float, Load]] = {}

    async def ask(self, peers: Collection[PeerId], tokens: int, within_s: float) -> None:
        """Returns when all have answered, cannot be reached, or the time is over."""
        if not peers:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s), asyncio.TaskGroup() as group:
                for peer in peers:
                    group.create_task(self._ask(peer, tokens))

    async def _ask(self, peer: PeerId, tokens: int) -> None:
        number, answered = next(self._numbers), asyncio.Event()
        self._asked[number] = peer, answered
        try:
            with contextlib.suppress(ConnectionLost):
                channel = await self._dial(peer)
                await channel.send(Probe(number, tokens), b"", Priority.CONTROL)
                await answered.wait()
        finally:
            del self._asked[number]

    def heard(self, peer: PeerId, load: Load) -> None:
        """An answer came. One that we wait for no longer, or never did, is left aside."""
        asked, answered = self._asked.get(load.request, (None, None))
        if asked == peer and answered is not None:
            self._loads[peer] = self._clock(), load
            answered.set()

    def loads(self) -> Mapping[PeerId, Load]:
        """What peers said in the last seconds."""
        oldest = self._clock() - FRESH_S
        self._loads = {peer: said for peer, said in self._loads.items() if said[0] > oldest}
        return {peer: load for peer, (_, load) in self._loads.items()}
