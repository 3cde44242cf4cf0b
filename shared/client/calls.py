"""Ask one peer for one pass through its layers, and wait for its answer. Others choose the peer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import msgspec

from shared.channel import Channel, Priority
from shared.errors import ChannelClosed, CorollaError
from shared.identity import PeerId
from shared.protocol import Backward, Forward, Lend, Outputs, PeerMessage, Refusal

Answer = tuple[Outputs, memoryview]


class NotServed(CorollaError):
    """A peer refused a request, and said why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Calls:
    """Requests that wait for their answers, each on one channel. Whoever calls bounds how many there are."""

    def __init__(self, dial: Callable[[PeerId], Awaitable[Channel]]) -> None:
        self._dial = dial
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[Channel, asyncio.Future[Answer]]] = {}

    async def ask(
        self,
        peer: PeerId,
        message: Forward | Backward | Lend,
        body: bytes | memoryview,
        priority: Priority = Priority.PREFILL,
    ) -> Answer:
        """What the peer answers; its `request` is filled in here. Raises NotServed or ConnectionLost."""
        channel = await self._dial(peer)
        request = next(self._numbers)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request] = channel, answer
        try:
            with channel.watched():
                await channel.send(msgspec.structs.replace(message, request=request), body, priority)
                return await answer
        finally:
            del self._waiting[request]
            if answer.done() and not answer.cancelled():
                answer.exception()  # sending may have failed for the same reason before

    async def tell(self, peer: PeerId, message: PeerMessage) -> None:
        """Send what needs no answer. Raises ConnectionLost."""
        channel = await self._dial(peer)
        await channel.send(message, b"", Priority.CONTROL)

    def heard(self, channel: Channel, message: Outputs | Refusal, body: memoryview) -> None:
        """An answer came. One that nobody waits for, or from another peer, is dropped."""
        asked, answer = self._waiting.get(message.request, (None, None))
        if asked is not channel or answer is None or answer.done():
            return
        if isinstance(message, Refusal):
            answer.set_exception(NotServed(message))
        else:
            answer.set_result((message, body))

    def channel_closed(self, channel: Channel) -> None:
        """Whoever waits for an answer by that channel waits in vain."""
        for asked, answer in self._waiting.values():
            if asked is channel and not answer.done():
                answer.set_exception(ChannelClosed(channel.reason))
