"""Opens a direct link beside a channel's relayed one, and again later when it failed or was lost.

The two sides describe themselves to each other inside the sealed link. The dialler counts the attempts, and
both make the first without being asked; later ones follow the dialler's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from msgspec.structs import replace

from shared.channel.addresses import public_candidates
from shared.channel.nat import hopeless
from shared.channel.webrtc import DirectLink
from shared.errors import ConnectionLost, ProtocolError
from shared.protocol import Describe, NatKind

log = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 5.0
# Nearly all pairs that can connect do so at the first try: 97.6 % of 4.4 million (arXiv 2510.27500).
RETRY_S = 60.0
# A link that worked once will likely work again.
RETRY_LOST_S = 10.0
# The other side may ask for attempts without end; each costs sockets.
PAUSE_S = 2.0

OPENING = "a direct link is being opened"

T = TypeVar("T")


class Upgrade:
    """The attempts of one channel. `make` is None when this side is to stay on the relay."""

    def __init__(
        self,
        *,
        make: Callable[[], DirectLink] | None,
        limit: asyncio.Semaphore,
        whereabouts: Callable[[], tuple[NatKind, str]],
        neighbours: bool,
        dialled: bool,
        send: Callable[[Describe], None],
        use: Callable[[DirectLink], None],
        drop: Callable[[DirectLink], None],
        traffic: Callable[[], int],
    ) -> None:
        self._make = make
        self._limit = limit
        self._whereabouts = whereabouts
        self._neighbours = neighbours
        self._dialled = dialled
        self._send = send
        self._use = use
        self._drop = drop
        self._traffic = traffic
        self._remote: Describe | None = None
        self._described = asyncio.Event()
        self._attempt = 0
        self._link: DirectLink | None = None
        self._again = asyncio.Event()
        self.why_relayed = OPENING
        """Why there is no direct link, in words; of no meaning while there is one."""

    def retry(self) -> None:
        """What failed may work now, or is needed again."""
        self._again.set()

    def described(self, message: Describe) -> None:
        """The other side told how to reach it. A newer attempt of its means that the current one is over."""
        if self._make is None:
            if message.candidates:
                self._send(_nowhere(message.attempt))
            return
        if self._remote is None or message.attempt > self._remote.attempt:
            self._remote = message
            self._described.set()
        if self._link is not None and message.attempt > self._attempt:
            self._link.lost.set()

    async def run(self) -> None:
        """Try until cancelled, or until it is clear that the other side wants no direct link."""
        if self._make is None:
            self.why_relayed = "this side wants no direct links"
            if self._dialled:
                self._send(_nowhere(1))
            return
        self._attempt = 1
        while not self._unwanted:
            worked = await self._try(self._make)
            await self._next(RETRY_LOST_S if worked else RETRY_S)

    @property
    def _unwanted(self) -> bool:
        return self._dialled and self._remote is not None and not self._remote.candidates

    async def _try(self, make: Callable[[], DirectLink]) -> bool:
        """One attempt, and the life of its link. True when there was one."""
        link = self._link = make()
        self.why_relayed = OPENING
        try:
            async with self._limit:
                own = self._tellable(await to_the_end(link.describe(self._attempt)))
                self._send(own)
                other = await self._their_description()
                if why := hopeless(own, other):
                    raise ConnectionLost(why)
                await link.open(other)
            self._use(link)
            await link.lost.wait()
            self.why_relayed = "the direct link was lost"
            return True
        except (ConnectionLost, ProtocolError, OSError) as error:
            log.info("attempt %d at a direct link: %s", self._attempt, error)
            self.why_relayed = str(error)
            return False
        finally:
            self._link = None
            self._drop(link)
            await to_the_end(link.close())

    def _tellable(self, own: Describe) -> Describe:
        """With what our relay knows of us, and without what is only a neighbour's business."""
        nat, seen = self._whereabouts()
        told = own.candidates if self._neighbours else public_candidates(own.candidates)
        return replace(own, nat=nat, seen=seen, candidates=told)

    async def _their_description(self) -> Describe:
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                while self._remote is None or self._remote.attempt < self._attempt:
                    self._described.clear()
                    await self._described.wait()
        except TimeoutError:
            raise ConnectionLost("the other side did not describe itself") from None
        if self._remote.attempt > self._attempt or not self._remote.candidates:
            raise ConnectionLost("the other side wants no direct link now")
        return self._remote

    async def _next(self, pause_s: float) -> None:
        """Wait until another attempt is due: by the clock and while traffic flows, or when asked for."""
        if self._dialled:
            await asyncio.sleep(PAUSE_S)
            while not self._again.is_set():
                before = self._traffic()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._again.wait()
                if self._traffic() != before:
                    break
            self._again.clear()
            self._attempt += 1
            return
        await asyncio.sleep(PAUSE_S)
        while self._remote is None or self._remote.attempt <= self._attempt:
            self._described.clear()
            await self._described.wait()
        self._attempt = self._remote.attempt


def _nowhere(attempt: int) -> Describe:
    return Describe(attempt=attempt, ufrag="", password="", fingerprint="", candidates=[])


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await something that must not be left half done: a cancellation takes effect after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:
            break
    if cancelled is not None:
        raise cancelled
    return task.result()
