"""A swarm of six hops without tensors, for the asker's side: what is on its way arrives when the test says.

A hop computes a hash of all inputs up to a position, so what it passes on tells whether it held the right
text; the token is a hash as well. `unsplit` says the same in one line, without any hop.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shared.client.session import Send
from shared.errors import NoRoute
from shared.identity import PeerId
from shared.protocol import (
    Close,
    Consumed,
    Grant,
    Locate,
    Lost,
    Open,
    Opened,
    PeerMessage,
    RouteSpan,
    Step,
    Tee,
    Token,
)

VOCABULARY = 97
HALF, LAYERS = 4, 8
HEADS = [PeerId(letter * 64) for letter in "abc"]
TAILS = [PeerId(letter * 64) for letter in "def"]
ASKER = PeerId("0" * 64)


def hidden(inputs: Sequence[object]) -> str:
    """What a hop makes of the last of these inputs."""
    return hashlib.sha256(repr(list(inputs)).encode()).hexdigest()[:16]


def unsplit(tokens: Sequence[int]) -> int:
    """The token that follows."""
    middle = [hidden(tokens[: end + 1]) for end in range(len(tokens))]
    return int(hidden(middle), 16) % VOCABULARY


class Rows(NamedTuple):
    """A step from one hop to another."""

    epoch: int
    position: int
    inputs: Sequence[object]
    sample: bool
    held: Sequence[int]
    copy: bool = False


class Memory:
    """What a hop knows of the session."""

    def __init__(self, opened: Open) -> None:
        self.inputs: list[object] = []
        self.take(opened)

    def take(self, opened: Open) -> None:
        self.opened = opened
        self.credit = opened.credit
        self.waiting: int | None = None
        self.next_holds: int | None = None
        self.tee: Tee | None = None
        self.told = 0

    @property
    def first(self) -> bool:
        return self.opened.index == 0

    def outputs(self, start: int) -> list[str]:
        return [hidden(self.inputs[: end + 1]) for end in range(start, len(self.inputs))]


class Miniature:
    """Three peers hold the first half and three the second. `asked` brings what the asker sends."""

    def __init__(self) -> None:
        self.alive = {*HEADS, *TAILS}
        self.memory: dict[PeerId, Memory] = {}
        self.links: dict[tuple[PeerId, PeerId], deque[object]] = {}
        """What is on its way from one to another, in order. Losses come to the asker in the same way."""

    # ------------------------------------------------------------ for the session

    def plan(
        self,
        survivors: Sequence[RouteSpan],
        avoid: frozenset[PeerId],
        held: Mapping[PeerId, int],
        replay: int,
    ) -> list[RouteSpan]:
        """Survivors stay, the rest is whoever comes first of those who seem to be there."""
        route = {span.start: span for span in survivors}
        for start, peers in ((0, HEADS), (HALF, TAILS)):
            fit = [peer for peer in peers if peer in self.alive and peer not in avoid]
            if start not in route and not fit:
                raise NoRoute(f"no live peer serves layers {start}–{start + HALF}")
            if start not in route:
                route[start] = RouteSpan(max(fit, key=lambda peer: held.get(peer, -1)), start, start + HALF)
        return [route[0], route[HALF]]

    def spare(self, entry: RouteSpan, avoid: frozenset[PeerId]) -> PeerId | None:
        peers = HEADS if entry.start == 0 else TAILS
        return next((peer for peer in reversed(peers) if peer in self.alive and peer not in avoid), None)

    def asked(self, send: Send) -> None:
        self._put(ASKER, send.peer, send)

    # ------------------------------------------------------------ for the test

    def waiting(self) -> list[tuple[PeerId, PeerId]]:
        return [link for link, messages in sorted(self.links.items()) if messages]

    def deliver(self, link: tuple[PeerId, PeerId]) -> object | None:
        """Let the first of a link's messages arrive; gives what arrived at the asker."""
        source, target = link
        message = self.links[link].popleft()
        if target == ASKER:
            return message
        if target not in self.alive:
            if source == ASKER:
                self._put(target, ASKER, target)
            return None
        if isinstance(message, Send):
            self._told(target, message)
        elif isinstance(message, Rows):
            self._fed(source, target, message)
        elif isinstance(message, Token):
            self._drawn(target, message)
        return None

    def kill(self, peer: PeerId) -> None:
        """All that it knew is gone; the asker hears of it, behind what it had said before."""
        self.alive.discard(peer)
        self.memory.pop(peer, None)
        for link, messages in self.links.items():
            if link[0] == peer and link[1] != ASKER:
                messages.clear()
        self._put(peer, ASKER, peer)

    # ------------------------------------------------------------ a hop

    def _told(self, me: PeerId, send: Send) -> None:
        message = send.message
        memory = self.memory.get(me)
        if isinstance(message, Open):
            if memory is None:
                memory = self.memory[me] = Memory(message)
            elif message.epoch > memory.opened.epoch or memory.opened.standby:
                memory.take(message)
            self._say(me, Opened(message.session, message.epoch, len(memory.inputs)))
        elif isinstance(message, Step):
            ids = array("i", send.body).tolist()
            rows = Rows(message.epoch, message.position, ids, message.sample, list(message.held))
            if memory is None:
                self._say(me, Lost(message.session, message.epoch, me))
            else:
                self._step(me, memory, rows)
        elif memory is None:
            return
        elif isinstance(message, Grant) and message.epoch == memory.opened.epoch:
            memory.credit = max(memory.credit, message.credit)
            self._go_round(me, memory)
        elif isinstance(message, Tee) and message.epoch == memory.opened.epoch:
            memory.tee, memory.told = message, message.position
            self._copy(me, memory)
        elif isinstance(message, Close):
            del self.memory[me]
        elif isinstance(message, Locate):
            self._say(me, Consumed(message.session, memory.opened.epoch, len(memory.inputs)))

    def _fed(self, source: PeerId, me: PeerId, rows: Rows) -> None:
        memory = self.memory.get(me)
        if memory is not None and memory.opened.standby == rows.copy:
            self._step(me, memory, rows)

    def _step(self, me: PeerId, memory: Memory, rows: Rows) -> None:
        opened = memory.opened
        if rows.epoch != opened.epoch:
            return
        if rows.position > len(memory.inputs):
            self._say(me, Lost(opened.session, rows.epoch, me))
            return
        memory.inputs[rows.position :] = rows.inputs
        if opened.standby or (memory.first and not (len(rows.inputs) == 1 and rows.sample)):
            self._say(me, Consumed(opened.session, opened.epoch, len(memory.inputs)))
        if opened.standby:
            return
        if rows.held and memory.first:
            memory.next_holds = min(rows.held[1], len(memory.inputs))
        if memory.first:
            self._pass_on(me, memory, rows)
        elif rows.sample:
            self._draw(me, memory)

    def _pass_on(self, me: PeerId, memory: Memory, rows: Rows) -> None:
        start = rows.position if memory.next_holds is None else memory.next_holds
        memory.next_holds = None
        following = PeerId(memory.opened.route[1].peer)
        step = Rows(rows.epoch, start, memory.outputs(start), rows.sample, ())
        self._put(me, following, step)
        self._copy(me, memory)

    def _copy(self, me: PeerId, memory: Memory) -> None:
        if memory.tee is not None and len(memory.inputs) > memory.told:
            rows = Rows(memory.opened.epoch, memory.told, memory.outputs(memory.told), False, (), copy=True)
            self._put(me, PeerId(memory.tee.peer), rows)
            memory.told = len(memory.inputs)

    def _draw(self, me: PeerId, memory: Memory) -> None:
        drawn = int(hidden(memory.inputs), 16) % VOCABULARY
        token = Token(memory.opened.session, memory.opened.epoch, len(memory.inputs), drawn)
        self._say(me, token)
        self._put(me, PeerId(memory.opened.route[0].peer), token)

    def _drawn(self, me: PeerId, token: Token) -> None:
        memory = self.memory.get(me)
        if memory is None or memory.opened.standby or token.epoch != memory.opened.epoch:
            return
        if token.position == len(memory.inputs):
            memory.waiting = token.token
            self._go_round(me, memory)

    def _go_round(self, me: PeerId, memory: Memory) -> None:
        if memory.waiting is not None and len(memory.inputs) + 1 < memory.credit:
            drawn, memory.waiting = memory.waiting, None
            self._step(me, memory, Rows(memory.opened.epoch, len(memory.inputs), [drawn], True, ()))

    def _say(self, me: PeerId, message: PeerMessage) -> None:
        self._put(me, ASKER, message)

    def _put(self, source: PeerId, target: PeerId, message: object) -> None:
        self.links.setdefault((source, target), deque()).append(message)
