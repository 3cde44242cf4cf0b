"""Who waits when the swarm is full, and in which order: each user in turn, so nobody's many questions keep
others waiting. One question at a time tries again; those who come later stand behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from shared.client.session import Drawn, Request, Rerouted
from shared.errors import Busy
from web.swarm import Swarm

LONGEST_LINE = 256
"""Questions that wait; each holds a connection and its prompt. One more is told when to come back."""
MOST_PER_USER = 32
PATIENCE_S = 120.0
"""After so long in line a question is given back with the swarm's own words."""
FULL_LINE_RETRY_S = 10.0
# What a peer says is a guess, and an answer may end any moment.
SOONEST_RETRY_S, LATEST_RETRY_S = 0.2, 2.0


class Waiting(msgspec.Struct, frozen=True):
    """The swarm is full; so many are served before, this one counted: 1 is the next, 0 has its turn now."""

    place: int


class Ticket:
    """A place in the line."""

    def __init__(self, user: str) -> None:
        self.user = user


class Line:
    """Tickets by user, in the order of turns. Pure: no clock, no tasks."""

    def __init__(self, longest: int = LONGEST_LINE, most_per_user: int = MOST_PER_USER) -> None:
        self._longest = longest
        self._most_per_user = most_per_user
        self._users: dict[str, deque[Ticket]] = {}
        """Whose turn is next comes first."""

    def __len__(self) -> int:
        return sum(len(tickets) for tickets in self._users.values())

    def join(self, user: str) -> Ticket:
        """Stand at the end of one's own questions. Raises Busy when there are too many."""
        mine = self._users.get(user, ())
        if len(self) >= self._longest or len(mine) >= self._most_per_user:
            raise Busy(
                f"the swarm is full and {len(self)} questions wait already; "
                f"try again in {FULL_LINE_RETRY_S:.0f} s",
                FULL_LINE_RETRY_S,
            )
        ticket = Ticket(user)
        self._users.setdefault(user, deque()).append(ticket)
        return ticket

    def place(self, ticket: Ticket) -> int:
        """1 for the next: a round takes one question of each user."""
        mine = self._users[ticket.user]
        round_of_mine = mine.index(ticket)
        users = list(self._users)
        at = users.index(ticket.user)
        before = 0
        for index, tickets in enumerate(self._users.values()):
            # Users ahead of us are served once more in our own round.
            before += min(len(tickets), round_of_mine + (index < at))
        return before + 1

    def leave(self, ticket: Ticket) -> None:
        """Served, or gone. The user who was next has its next turn after all others."""
        mine = self._users[ticket.user]
        served = self.place(ticket) == 1
        mine.remove(ticket)
        if not mine:
            del self._users[ticket.user]
        elif served:
            self._users[ticket.user] = self._users.pop(ticket.user)


class WaitingLines:
    """Asks a swarm, for one user after another whenever it is full; each model has its own line."""

    def __init__(
        self,
        swarm: Swarm,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._swarm = swarm
        self._patience_s = patience_s
        self._clock = clock
        self._lines: dict[str, _ModelLine] = {}

    async def generate(self, user: str, request: Request) -> AsyncGenerator[Drawn | Rerouted | Waiting, None]:
        """As `Swarm.generate`, with one's place in the line whenever it changed, until a route has room.

        Raises what that raises: Busy when the line is too long, or after `patience_s` in it.
        """
        line = self._lines.setdefault(request.artefact, _ModelLine(self._clock))
        visit = _Visit(user, line.tickets, self._clock() + self._patience_s)
        line.visits += 1
        try:
            if line.tickets:
                visit.wait()
            while True:
                async with aclosing(line.turn(visit)) as places:
                    async for waiting in places:
                        yield waiting
                try:
                    events = self._swarm.generate(request, lambda: line.served(visit))
                    async with aclosing(visit.told_of_its_turn(events)) as told:
                        async for event in told:
                            yield event
                    return
                except Busy as busy:
                    if visit.turn_came.is_set():
                        raise
                    line.refused(visit, busy)
        finally:
            visit.leave()
            line.visits -= 1
            if line.visits == 0:
                del self._lines[request.artefact]
            # What this one held comes free.
            line.stir()


class _ModelLine:
    """Those who wait for one model, and when the next of them may try."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.tickets = Line()
        self.visits = 0
        """Questions that wait or are being answered."""
        self._clock = clock
        self._not_before = 0.0
        self._stirred = asyncio.Event()

    async def turn(self, visit: _Visit) -> AsyncGenerator[Waiting, None]:
        """One's place, whenever it changed, until one may try. Raises Busy when one's patience ends."""
        told = 0
        while (place := visit.place) > 1 or (place == 1 and self._clock() < self._not_before):
            wait_s = visit.deadline - self._clock()
            if wait_s <= 0:
                raise visit.busy
            if place != told:
                told = place
                yield Waiting(place)
            if place == 1:
                wait_s = min(wait_s, self._not_before - self._clock())
            stirred = self._stirred
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(wait_s, 0.0)):
                    await stirred.wait()

    def served(self, visit: _Visit) -> None:
        """There was room for it: the next one may try."""
        visit.turn_came.set()
        visit.leave()
        self.stir()

    def refused(self, visit: _Visit, busy: Busy) -> None:
        """There was none: it waits, and whoever is next tries again a little later."""
        visit.busy = busy
        visit.wait()
        self._not_before = self._clock() + min(max(busy.retry_after_s, SOONEST_RETRY_S), LATEST_RETRY_S)

    def stir(self) -> None:
        """Everyone looks at its place, and the next one tries at once."""
        self._not_before = 0.0
        # Those who wait hold the old event; who begins to wait now must not be woken by it.
        self._stirred.set()
        self._stirred = asyncio.Event()


class _Visit:
    """One question, with the ticket that it takes only when it has to."""

    def __init__(self, user: str, tickets: Line, deadline: float) -> None:
        self.turn_came = asyncio.Event()
        """Set when a route had room for it."""
        self.deadline = deadline
        self.busy = Busy("the swarm stayed full; try again later", FULL_LINE_RETRY_S)
        """What to say when patience ends: the swarm's own last words."""
        self._user = user
        self._tickets = tickets
        self._ticket: Ticket | None = None

    async def told_of_its_turn(
        self, events: AsyncGenerator[Drawn | Rerouted, None]
    ) -> AsyncGenerator[Drawn | Rerouted | Waiting, None]:
        """The events, and before the first, if this one stood in line, that its turn has come.

        The first token may take long: until then it would look as if it stood there still.
        """
        async with aclosing(events):
            if self._ticket is not None:
                first = asyncio.ensure_future(anext(events, None))
                turn = asyncio.ensure_future(self.turn_came.wait())
                try:
                    await asyncio.wait((first, turn), return_when=asyncio.FIRST_COMPLETED)
                    if self.turn_came.is_set():
                        yield Waiting(0)
                    if (event := await first) is not None:
                        yield event
                finally:
                    # The generator can only be closed when nobody is inside.
                    for task in (first, turn):
                        task.cancel()
                    await asyncio.wait((first, turn))
            async for event in events:
                yield event

    @property
    def place(self) -> int:
        """0 without a ticket."""
        return self._tickets.place(self._ticket) if self._ticket else 0

    def wait(self) -> None:
        self._ticket = self._ticket or self._tickets.join(self._user)

    def leave(self) -> None:
        if self._ticket is not None:
            self._tickets.leave(self._ticket)
            self._ticket = None
