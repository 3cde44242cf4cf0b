"""Copies of what a hop passes on, for the standby of the hop behind it: in chunks, and behind all else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from peer.serving.input_log import InputLog
from shared.channel import Channel, Priority
from shared.errors import ConnectionLost
from shared.identity import PeerId
from shared.protocol import PREFILL_CHUNK, TEE_ROWS, TEE_WINDOW, Step, Tee, Tensor, WireDtype


class TeeRun:
    """Reads the log as it grows. `run` it beside the session; it ends when the standby cannot be reached."""

    def __init__(self, tee: Tee, log: InputLog, dtype: WireDtype, hidden_size: int) -> None:
        self.peer = PeerId(tee.peer)
        self.channel: Channel | None = None
        self._tee = tee
        self._log = log
        self._dtype: WireDtype = dtype
        self._hidden_size = hidden_size
        self._sent = tee.position
        self._allowed = tee.position + TEE_WINDOW
        self._stirred = asyncio.Event()

    def written(self, position: int) -> None:
        """The log was cut at `position` and grew from there."""
        if position < self._sent:
            self._sent = position
        self._stirred.set()

    def consumed(self, position: int) -> None:
        """The standby is done with all before `position`."""
        self._allowed = max(self._allowed, position + TEE_WINDOW)
        self._stirred.set()

    async def run(self, dial: Callable[[PeerId], Awaitable[Channel]]) -> None:
        """Send until cancelled. Raises ConnectionLost."""
        while True:
            step, rows = await self._next()
            if self.channel is None or self.channel.closed.is_set():
                self.channel = await dial(self.peer)
            await self.channel.send(step, rows, Priority.BACKGROUND)

    async def _next(self) -> tuple[Step, bytes]:
        while (end := self._end()) - self._sent < TEE_ROWS:
            self._stirred.clear()
            await self._stirred.wait()
        start, self._sent = self._sent, end
        step = Step(
            session=self._tee.session,
            epoch=self._tee.epoch,
            position=start,
            count=end - start,
            tensor=Tensor(self._dtype, [end - start, self._hidden_size]),
        )
        return step, self._log.read(start, end)

    def _end(self) -> int:
        return min(len(self._log), self._sent + PREFILL_CHUNK, self._allowed)


async def reach(dial: Callable[[PeerId], Awaitable[Channel]], peer: PeerId) -> None:
    """Open a channel that will be wanted in a hurry; without success nothing is lost yet."""
    with contextlib.suppress(ConnectionLost):
        await dial(peer)
