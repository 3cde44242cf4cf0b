"""A simulated peer: one thread that computes, and its part of each session as the protocol has it.

What a hop does with a message is what `peer/serving/` does, without tensors: caches and logs are numbers of
positions. Passes are not joined: a peer takes as long for two positions as twice for one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from bench.simulation.machines import Machine
from shared.identity import PeerId
from shared.protocol import (
    PREFILL_CHUNK,
    TEE_ROWS,
    TEE_WINDOW,
    Close,
    Consumed,
    Decline,
    Fetch,
    Files,
    Grant,
    Load,
    Locate,
    Lost,
    Open,
    Opened,
    PeerMessage,
    Probe,
    Renew,
    Step,
    Tee,
    Token,
)
from shared.spans import Span

if TYPE_CHECKING:
    from bench.simulation.gateway import Gateway
    from bench.simulation.swarm import SimulatedSwarm

PIECE_S = 0.15
"""A piece of a prompt takes about so long; as `TARGET_MS` of the batcher."""
IN_BACKGROUND = 5
SMALLEST_PIECE = 16
SMOOTHING = 0.1
RETRY_S = 2.0


class Work(msgspec.Struct):
    """Positions of a session on their way through a peer."""

    hop: Hop
    epoch: int
    position: int
    left: int
    sample: bool
    held: list[int]
    came: float
    feeder: PeerId | None = None
    """Who sent a copy for a standby."""


class SimulatedPeer:
    """Give it messages; it answers by way of the swarm."""

    def __init__(self, machine: Machine, span: Span, swarm: SimulatedSwarm) -> None:
        self.machine = machine
        self.id = machine.id
        self.span = span
        self.swarm = swarm
        self.state = "joining"
        self.alive = True
        self.moved_at: int | None = None
        """How often anyone had joined or left when it moved here."""
        self.hops: dict[str, Hop] = {}
        self.wait_ms = 0.0
        self.busy_s = 0.0
        self.kv_positions_free = float(machine.kv_positions)
        self._urgent: deque[Work] = deque()
        self._later: deque[Work] = deque()
        self._pass: deque[Work] = deque()
        self._busy = False

    # ------------------------------------------------------------ computing

    def enqueue(self, work: Work) -> None:
        """Of each hop one step waits for its turn at the peer, and the others behind it, in their order."""
        work.hop.steps.append(work)
        if work.hop.steps[0] is work:
            self._line_up(work)
        if not self._busy:
            self._next()

    def _line_up(self, work: Work) -> None:
        (self._later if work.feeder is not None or work.hop.standby else self._urgent).append(work)

    def _over(self, work: Work) -> None:
        steps = work.hop.steps
        steps.popleft()
        if steps:
            self._line_up(steps[0])

    def _next(self) -> None:
        while work := self._take_turn():
            if work.epoch != work.hop.epoch or work.hop.over:
                self._over(work)
                continue
            piece_s = PIECE_S / IN_BACKGROUND if work.hop.standby else PIECE_S
            pieces = max(SMALLEST_PIECE, int(piece_s * self.machine.speed / work.hop.layers))
            count = min(work.left, pieces)
            takes_s = count * work.hop.layers / self.machine.speed
            if work.left == 1 and not work.hop.standby:
                waited_ms = (self.swarm.kernel.now - work.came) * 1000
                self.wait_ms += SMOOTHING * (waited_ms - self.wait_ms)
            self._busy = True
            self.busy_s += takes_s
            self.swarm.kernel.after(takes_s, self._computed, work, count)
            return

    def _take_turn(self) -> Work | None:
        """As `peer/serving/batcher.py` chooses: all single positions and one piece of longer steps.

        What standbys are sent waits until there is nothing else.
        """
        if not self._pass:
            longer = next((work for work in self._urgent if work.left > 1), None)
            self._pass.extend(work for work in self._urgent if work.left == 1 or work is longer)
            self._urgent = deque(work for work in self._urgent if work.left > 1 and work is not longer)
        queue = self._pass or self._later
        return queue.popleft() if queue else None

    def _computed(self, work: Work, count: int) -> None:
        self._busy = False
        if not self.alive:
            return
        work.left -= count
        work.position += count
        if work.epoch == work.hop.epoch and not work.hop.over:
            work.hop.computed(work, count, last=not work.left)
        if work.left:
            self._line_up(work)
        else:
            self._over(work)
        if not self._busy:
            self._next()

    # ------------------------------------------------------------ messages of askers

    def receive(self, gateway: Gateway, message: PeerMessage) -> None:
        match message:
            case Open():
                self._open(gateway, message)
            case Step(session=session):
                hop = self.hops.get(session)
                if hop is None:
                    self.swarm.tell(self, gateway, Lost(session, message.epoch, self.id))
                elif message.epoch == hop.epoch:
                    self.enqueue(self._work(hop, message))
            case Grant(session=session, epoch=epoch, credit=credit):
                hop = self.hops.get(session)
                if hop is not None and hop.epoch == epoch:
                    hop.grant(credit)
            case Tee():
                hop = self.hops.get(message.session)
                if hop is not None and hop.epoch == message.epoch:
                    hop.tee = [message.peer, message.position, message.position]
                    hop.pump_tee()
            case Locate(session=session):
                if (hop := self.hops.get(session)) is not None:
                    self.swarm.tell(self, gateway, Consumed(session, hop.epoch, hop.held))
            case Close(session=session):
                self.forget(session)
            case Renew() | Probe() | Fetch():
                pass  # askers do not vanish here, and probes are answered by `load`
            case _:
                assert not isinstance(message, Opened | Decline | Lost | Token | Load | Files)

    def _work(self, hop: Hop, step: Step) -> Work:
        return Work(
            hop, step.epoch, step.position, step.count, step.sample, list(step.held), self.swarm.kernel.now
        )

    def _open(self, gateway: Gateway, opened: Open) -> None:
        hop = self.hops.get(opened.session)
        if hop is not None and opened.epoch <= hop.epoch and not hop.standby:
            return
        mine = opened.route[opened.index]
        layers = mine.end - mine.start
        if hop is None:
            needed = opened.max_tokens * layers / len(self.span)
            code = self._refusal(needed, Span(mine.start, mine.end))
            if code is not None:
                refusal = Decline(opened.session, opened.epoch, code, "", RETRY_S)  # type: ignore[arg-type]
                self.swarm.tell(self, gateway, refusal)
                return
            self.kv_positions_free -= needed
            hop = self.hops[opened.session] = Hop(self, gateway, needed, layers)
        elif hop.layers != layers:
            hop.layers, hop.held = layers, 0
        hop.take(opened)
        self.swarm.tell(self, gateway, Opened(opened.session, opened.epoch, hop.held))

    def _refusal(self, needed: float, mine: Span) -> str | None:
        if self.state != "serving":
            return "draining"
        if not self.span.holds(mine):
            return "layers"
        return "busy" if needed > self.kv_positions_free else None

    def load(self) -> Load:
        """As a probe finds it."""
        free = max(0, int(self.kv_positions_free)) if self.state == "serving" else 0
        return Load(
            request=0,
            sessions=len(self.hops),
            wait_ms=self.wait_ms if self.hops else 0.0,
            ms_per_layer=1000 / self.machine.speed,
            kv_tokens_free=free,
            kv_tokens=self.machine.kv_positions,
            retry_after_s=RETRY_S if not free else 0.0,
        )

    def forget(self, session: str) -> None:
        hop = self.hops.pop(session, None)
        if hop is not None:
            hop.over = True
            self.kv_positions_free += hop.reserved

    def end(self) -> None:
        """It is gone, with all that it held."""
        self.alive = False
        for session in list(self.hops):
            self.forget(session)
        self._urgent.clear()
        self._later.clear()
        self._pass.clear()


class Hop:
    """One session's part on a peer."""

    def __init__(self, peer: SimulatedPeer, gateway: Gateway, reserved: float, layers: int) -> None:
        self.peer = peer
        self.gateway = gateway
        self.reserved = reserved
        self.layers = layers
        self.opened: Open
        self.epoch = -1
        self.held = 0
        self.standby = False
        self.over = False
        self.steps: deque[Work] = deque()
        """What it has to compute: the first waits for its turn, or is being computed."""
        self.tee: list[object] = []
        """The standby of the next hop, up to where it was sent copies, and what it has consumed."""
        self._credit = 0
        self._next_holds = 0
        self._known: list[int] = []
        """What every hop held when the epoch began."""
        self._waiting: int | None = None
        """The position of a token that no credit covers yet."""

    def take(self, opened: Open) -> None:
        self.opened = opened
        self.epoch = opened.epoch
        self.standby = opened.standby
        self._credit = opened.credit
        self._next_holds = 0
        self._known = []
        self._waiting = None
        self.tee = []

    def computed(self, work: Work, count: int, *, last: bool) -> None:
        """`count` positions up to the work's are through."""
        session = self.opened.session
        self.held = work.position
        swarm, me = self.peer.swarm, self.peer
        if self.standby:
            swarm.tell(me, self.gateway, Consumed(session, self.epoch, self.held))
            if work.feeder is not None:
                swarm.pass_on(
                    me, work.feeder, session, 0, self._tee_consumed, work.feeder, session, self.held
                )
            return
        if work.held and not self._known:
            self._known = work.held
            index = self.opened.index + 1
            self._next_holds = work.held[index] if index < len(work.held) else 0
        if self.opened.index == 0 and (count > 1 or not work.sample):
            swarm.tell(me, self.gateway, Consumed(session, self.epoch, self.held))
        if self.opened.index < len(self.opened.route) - 1:
            self._pass_on(sample=work.sample and last)
        elif work.sample and last:
            self._draw()

    def _pass_on(self, *, sample: bool) -> None:
        following = PeerId(self.opened.route[self.opened.index + 1].peer)
        while self._next_holds < self.held:
            count = min(self.held - self._next_holds, PREFILL_CHUNK)
            start = self._next_holds
            self._next_holds += count
            draws = sample and self._next_holds == self.held
            swarm, me = self.peer.swarm, self.peer
            arguments = (following, self.opened.session, self.epoch, start, count, draws, self._known)
            swarm.pass_on(me, following, self.opened.session, count, swarm.step_arrives, *arguments)
        if self.tee:
            self.pump_tee()

    def _draw(self) -> None:
        session, position = self.opened.session, self.held
        swarm, me = self.peer.swarm, self.peer
        swarm.tell(me, self.gateway, Token(session, self.epoch, position, 0))
        first = PeerId(self.opened.route[0].peer)
        swarm.pass_on(me, first, session, 0, swarm.token_arrives, first, session, self.epoch, position)

    def token(self, position: int) -> None:
        """At the first hop: the token of a round, which is the next round's input."""
        if position + 1 >= self._credit:
            self._waiting = position
            return
        now = self.peer.swarm.kernel.now
        self.peer.enqueue(Work(self, self.epoch, position, 1, True, [], now))

    def grant(self, credit: int) -> None:
        self._credit = max(self._credit, credit)
        if self._waiting is not None and self._waiting + 1 < self._credit:
            position, self._waiting = self._waiting, None
            self.token(position)

    # ------------------------------------------------------------ copies for a standby

    def pump_tee(self) -> None:
        if not self.tee:
            return
        peer, sent, consumed = PeerId(str(self.tee[0])), int(str(self.tee[1])), int(str(self.tee[2]))
        swarm = self.peer.swarm
        while self.held - sent >= TEE_ROWS and sent - consumed < TEE_WINDOW:
            count = min(PREFILL_CHUNK, self.held - sent)
            arguments = (peer, self.opened.session, self.epoch, sent, count, self.peer.id)
            swarm.pass_on(self.peer, peer, self.opened.session, count, swarm.copy_arrives, *arguments)
            sent += count
        self.tee[1] = sent

    def _tee_consumed(self, feeder: PeerId, session: str, position: int) -> None:
        peer = self.peer.swarm.peers.get(feeder)
        hop = peer.hops.get(session) if peer is not None else None
        if hop is not None and hop.tee and hop.tee[0] == self.peer.id:
            hop.tee[2] = position
            hop.pump_tee()
