"""The simulated swarm: machines that come, compute, move and go; gateways with users; what was measured."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bench.simulation import petals
from bench.simulation.gateway import Asking, Gateway
from bench.simulation.kernel import Kernel
from bench.simulation.machines import FARTHEST_S, NEAREST_S, Machine, draw_life_s, draw_machine
from bench.simulation.peer import SimulatedPeer, Work
from peer.placement import (
    DRAIN_S,
    PROPAGATION_S,
    RECONSIDER_S,
    Placed,
    choose_move,
    choose_span,
    spans_of_length,
)
from shared.announcement import RENEW_EVERY_S
from shared.client.route_planner import Candidate
from shared.identity import PeerId
from shared.protocol import PeerMessage
from shared.spans import Span, coverage

CLOSED_S = 0.3
"""A process that ends is noticed so soon: its connections close, or the relay says that it is gone."""
SILENT_S = 1.2
"""A machine that falls silent, by heartbeats."""
SILENT_PART = 0.5
LOAD_S = (20.0, 60.0)
"""What loading a span takes."""


class Told(msgspec.Struct):
    """What was measured."""

    tokens: int = 0
    positions: int = 0
    answers: int = 0
    failed: int = 0
    busy: int = 0
    reroutes: int = 0
    moves: int = 0
    deaths: int = 0
    joined: int = 0
    orphaned: int = 0
    """Layers that lost their last peer by a move."""
    first_tokens: list[float] = []
    gaps: list[float] = []
    recoveries: list[float] = []
    """From a peer's death to the next token of an answer, where somebody stood by, whoever took over."""
    replays: list[float] = []
    """The same where nobody stood by, or the prompt was still being computed."""
    hops: list[int] = []
    errors: Counter[str] = msgspec.field(default_factory=Counter)


class Users(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks: each user asks, reads, thinks, and asks again."""

    count: int
    gateways: int = 8
    prompt: tuple[int, int] = (16, 64)
    new: tuple[int, int] = (64, 192)
    think_s: float = 0.0


class Churn(msgspec.Struct, frozen=True, kw_only=True):
    """How machines come and go; for each that goes another one comes."""

    mean_life_s: float
    outage_every_s: float = 1800.0
    outage_part: float = 0.03
    """Of all peers, that one outage of a provider takes down at once."""


class SimulatedSwarm:
    """Give it machines in their places, users and a seed; then `run`."""

    def __init__(
        self,
        machines: Sequence[Machine],
        placed: Sequence[Placed],
        layers: int,
        users: Users,
        *,
        seed: int,
        standbys: bool = True,
        petals: bool = False,
        churn: Churn | None = None,
        moves: bool = False,
    ) -> None:
        self.kernel = Kernel()
        self.numbers = random.Random(seed)
        self.layers = layers
        self.users = users
        self.standbys = standbys
        self.petals = petals
        self.churn = churn
        self.told = Told()
        self.peers: dict[PeerId, SimulatedPeer] = {}
        self.delays: dict[PeerId, float] = {}
        self.announced: dict[PeerId, Candidate] = {}
        self._moves = moves
        self._asking = True
        self._machines = {machine.id: machine for machine in machines}
        self._next_number = len(machines)
        self._links: dict[tuple[object, ...], float] = {}
        self._dead: dict[PeerId, tuple[float, float]] = {}
        """When each of those that are gone died, and when that was noticed."""
        self._placed: list[Placed] | None = None
        self._changes = 0
        """How often anyone joined or left."""
        for each in placed:
            self._add(self._machines[each.peer], each.span, serving=True)
        self.gateways = [
            Gateway(number, self.numbers.uniform(NEAREST_S, FARTHEST_S), self)
            for number in range(users.gateways)
        ]
        for user in range(users.count):
            # Not all at the same moment.
            self.kernel.after(self.numbers.uniform(0, max(5.0, users.think_s)), self._ask, user)
        if churn is not None:
            self.kernel.after(self.numbers.expovariate(1 / churn.outage_every_s), self._outage)

    def run(self, until_s: float) -> Told:
        self.kernel.run(until_s)
        return self.told

    # ------------------------------------------------------------ users

    def stop_asking(self) -> None:
        """Nobody asks anything new; what runs goes on."""
        self._asking = False

    def _ask(self, user: int) -> None:
        if not self._asking:
            return
        prompt, new = self.numbers.randint(*self.users.prompt), self.numbers.randint(*self.users.new)
        gateway = self.gateways[user % len(self.gateways)]
        gateway.ask(Asking(user, prompt, new, self.kernel.now))

    def answered(self, gateway: Gateway, asking: Asking) -> None:
        think_s = self.users.think_s
        self.kernel.after(self.numbers.expovariate(1 / think_s) if think_s else 0.0, self._ask, asking.user)

    # ------------------------------------------------------------ messages

    def send(self, gateway: Gateway, to: PeerId, session: str, message: PeerMessage) -> None:
        """From an asker to a peer."""
        peer = self.peers.get(to)
        if peer is None or not peer.alive:
            died_at, noticed_at = self._dead[to]
            self.kernel.after(
                max(CLOSED_S, noticed_at - self.kernel.now), gateway.unreachable, session, to, died_at
            )
            return
        delay_s = gateway.delay_s + peer.machine.delay_s
        if to not in gateway.channels:
            gateway.channels.add(to)
            delay_s *= 5  # an offer and its answer by a relay come first
        delay_s = self._in_order((gateway.number, to, session), delay_s)
        self.kernel.after(delay_s, self._arrives, peer, gateway, message)

    def _arrives(self, peer: SimulatedPeer, gateway: Gateway, message: PeerMessage) -> None:
        if peer.alive:
            peer.receive(gateway, message)

    def tell(self, peer: SimulatedPeer, gateway: Gateway, message: PeerMessage) -> None:
        """From a peer to an asker."""
        session: str = message.session  # type: ignore[union-attr]
        link = peer.id, gateway.number, session
        delay_s = self._in_order(link, gateway.delay_s + peer.machine.delay_s)
        self.kernel.after(delay_s, gateway.received, peer.id, session, message)

    def pass_on(
        self,
        peer: SimulatedPeer,
        to: PeerId,
        session: str,
        rows: int,
        action: Callable[..., None],
        *arguments: Any,  # noqa: ANN401
    ) -> None:
        """From a peer to another one, with so many rows of hidden states."""
        there = self.delays.get(to)
        if there is not None:
            delay_s = peer.machine.delay_s + there + rows * peer.machine.row_s
            self.kernel.after(self._in_order((peer.id, to, session), delay_s), action, *arguments)

    def _in_order(self, link: tuple[object, ...], delay_s: float) -> float:
        """Messages of one session from one to another do not overtake each other."""
        at = max(self.kernel.now + delay_s, self._links.get(link, 0.0))
        self._links[link] = at
        return at - self.kernel.now

    def step_arrives(
        self, to: PeerId, session: str, epoch: int, position: int, count: int, sample: bool, held: list[int]
    ) -> None:
        peer = self.peers.get(to)
        hop = peer.hops.get(session) if peer is not None and peer.alive else None
        if peer is not None and hop is not None and hop.epoch == epoch:
            peer.enqueue(Work(hop, epoch, position, count, sample, held, self.kernel.now))

    def copy_arrives(
        self, to: PeerId, session: str, epoch: int, position: int, count: int, feeder: PeerId
    ) -> None:
        peer = self.peers.get(to)
        hop = peer.hops.get(session) if peer is not None and peer.alive else None
        if peer is not None and hop is not None and hop.epoch == epoch and hop.standby:
            peer.enqueue(Work(hop, epoch, position, count, False, [], self.kernel.now, feeder))

    def token_arrives(self, to: PeerId, session: str, epoch: int, position: int) -> None:
        peer = self.peers.get(to)
        hop = peer.hops.get(session) if peer is not None and peer.alive else None
        if hop is not None and hop.epoch == epoch and not hop.standby:
            hop.token(position)

    # ------------------------------------------------------------ peers

    def _add(self, machine: Machine, span: Span, *, serving: bool) -> None:
        peer = self.peers[machine.id] = SimulatedPeer(machine, span, self)
        self.delays[machine.id] = machine.delay_s
        self._placed = None
        self._changes += 1
        if serving:
            self._serve(peer)
        else:
            self.kernel.after(self.numbers.uniform(*LOAD_S), self._serve, peer)
        if self.churn is not None:
            life_s = draw_life_s(self.numbers, self.churn.mean_life_s)
            self.kernel.after(life_s, self.kill, machine.id)

    def _serve(self, peer: SimulatedPeer) -> None:
        if not peer.alive:
            return
        peer.state = "serving"
        self._placed = None
        self.kernel.after(self.numbers.uniform(0, RENEW_EVERY_S), self._renew, peer, peer.span)
        self._announce(peer)
        if self._moves:
            self.kernel.after(self.numbers.uniform(0.5, 1.5) * RECONSIDER_S, self._reconsider, peer)

    def _renew(self, peer: SimulatedPeer, span: Span) -> None:
        if peer.alive and peer.state == "serving" and peer.span == span:
            self._announce(peer)
            self.kernel.after(RENEW_EVERY_S, self._renew, peer, span)

    def _announce(self, peer: SimulatedPeer) -> None:
        load = peer.load()
        self.announced[peer.id] = Candidate(
            peer=peer.id,
            span=peer.span,
            kv_tokens_free=load.kv_tokens_free,
            ms_per_layer=load.ms_per_layer,
            sessions=load.sessions,
            wait_ms=load.wait_ms,
        )

    def placed(self) -> list[Placed]:
        """Every live peer as its announcement shows it."""
        if self._placed is None:
            self._placed = [
                Placed(
                    peer.id,
                    peer.span,
                    peer.machine.speed,
                    peer.state,  # type: ignore[arg-type]
                    movable=peer.moved_at != self._changes,
                )
                for peer in self.peers.values()
            ]
        return self._placed

    def kill(self, who: PeerId) -> None:
        """A machine goes without a word; askers notice by its closing connections or its silence."""
        peer = self.peers.pop(who, None)
        if peer is None:
            return
        self.kernel.note("die", peer.machine.number)
        self.told.deaths += 1
        self._placed = None
        self._changes += 1
        peer.end()
        for gateway in self.gateways:
            gateway.died(who)
        notice_s = SILENT_S if self.numbers.random() < SILENT_PART else CLOSED_S
        self._dead[who] = self.kernel.now, self.kernel.now + notice_s
        self.kernel.after(notice_s, self._noticed, who, self.kernel.now)
        if self.churn is not None:
            self.kernel.after(self.numbers.uniform(0, 120), self._join)

    def _noticed(self, who: PeerId, died_at: float) -> None:
        self.announced.pop(who, None)
        for gateway in self.gateways:
            gateway.lost(who, died_at)

    def _outage(self) -> None:
        assert self.churn is not None
        victims = self.numbers.sample(
            sorted(self.peers), max(1, round(self.churn.outage_part * len(self.peers)))
        )
        for victim in victims:
            self.kill(victim)
        self.kernel.after(self.numbers.expovariate(1 / self.churn.outage_every_s), self._outage)

    def _join(self) -> None:
        machine = draw_machine(self.numbers, self._next_number, self.layers)
        self._next_number += 1
        self._machines[machine.id] = machine
        span = self._choose(machine)
        self.told.joined += 1
        self.kernel.note("join", machine.number * 1000 + span.start)
        self._add(machine, span, serving=False)

    def _choose(self, machine: Machine) -> Span:
        if self.petals:
            return petals.window(petals.throughput(self.placed(), self.layers), machine.layers)
        options = spans_of_length(machine.layers, self.layers)
        return choose_span(self.placed(), options, machine.speed, self.layers).span

    # ------------------------------------------------------------ moving

    def _reconsider(self, peer: SimulatedPeer) -> None:
        if not peer.alive or peer.state != "serving":
            return
        if self._better(peer) is None:
            self.kernel.after(self.numbers.uniform(0.5, 1.5) * RECONSIDER_S, self._reconsider, peer)
            return
        self._set_state(peer, "draining")
        self.kernel.after(PROPAGATION_S, self._confirm, peer)

    def _confirm(self, peer: SimulatedPeer) -> None:
        if not peer.alive:
            return
        span = self._better(peer)
        if span is None:
            self._set_state(peer, "serving")
            self._announce(peer)
            self.kernel.after(self.numbers.uniform(0.5, 1.5) * RECONSIDER_S, self._reconsider, peer)
            return
        self.kernel.note("move", peer.machine.number * 1000 + span.start)
        self.told.moves += 1
        counts = coverage((each.span for each in self.placed() if each.state == "serving"), self.layers)
        self.told.orphaned += sum(not count for count in counts[peer.span.start : peer.span.end])
        self.kernel.after(DRAIN_S, self._move, peer, span)

    def _better(self, peer: SimulatedPeer) -> Span | None:
        everyone = self.placed()
        me = next(each for each in everyone if each.peer == peer.id)
        others = [each for each in everyone if each.peer != peer.id]
        options = spans_of_length(peer.machine.layers, self.layers)
        choice = choose_move(me, others, options, self.layers)
        return choice.span if choice else None

    def _set_state(self, peer: SimulatedPeer, state: str) -> None:
        peer.state = state
        self._placed = None
        self.announced.pop(peer.id, None)

    def _move(self, peer: SimulatedPeer, span: Span) -> None:
        """Its answers had their time; what is left goes on elsewhere."""
        if not peer.alive:
            return
        peer.end()
        for gateway in self.gateways:
            gateway.lost(peer.id, self.kernel.now)
        moved = self.peers[peer.id] = SimulatedPeer(peer.machine, span, self)
        moved.moved_at = self._changes
        self._placed = None
        self.kernel.after(self.numbers.uniform(*LOAD_S), self._serve, moved)
