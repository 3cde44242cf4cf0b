"""A simulated gateway: many askers with one map of the swarm, each with a true `ClientSession`.

It plans as `shared/client/swarm_client.py` does: announcements that may be old, what probed peers say now,
its own sessions, and round trips to those peers alone that it has a channel to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from bench.simulation import petals
from shared.client.route_planner import Candidate, fill_route
from shared.client.session import (
    ClientSession,
    Drawn,
    Effect,
    Emit,
    Event,
    Finish,
    PeerLost,
    Received,
    Request,
    Rerouted,
    Send,
)
from shared.client.standbys import choose_standby
from shared.client.swarm_client import BUSY_STANDBY_MS
from shared.client.two_choices import informed, replays_by_peer, two_choices
from shared.errors import Busy, CorollaError, NoRoute
from shared.identity import PeerId
from shared.protocol import Load, PeerMessage, RouteSpan
from shared.spans import Span

if TYPE_CHECKING:
    from bench.simulation.swarm import SimulatedSwarm

ARTEFACT = "0" * 64
PROBE_S = 0.15
LOAD_FRESH_S = 3.0
AGAIN_S = 2.0
"""When a swarm that is full is asked again."""


class Asking:
    """One question of a user, from its sending to its last token."""

    def __init__(self, user: int, prompt: int, new: int, asked_at: float) -> None:
        self.user = user
        self.prompt = prompt
        self.new = new
        self.asked_at = asked_at
        self.session = ""
        self.machine: ClientSession
        self.route: Sequence[RouteSpan] = []
        """As it is counted among our sessions."""
        self.token_at: float | None = None
        self.died_at: float | None = None
        """When a peer of its route died, until the next token by another route."""
        self.died_in = 0
        """The epoch in which it did."""
        self.stood_by = True
        """Somebody stood by for each that died since, when it died or when that was noticed."""
        self.wakes = False
        """It will be looked at again."""


class Gateway:
    def __init__(self, number: int, delay_s: float, swarm: SimulatedSwarm) -> None:
        self.number = number
        self.delay_s = delay_s
        self.swarm = swarm
        self.askings: dict[str, Asking] = {}
        self.ours: Counter[str] = Counter()
        self.channels: set[PeerId] = set()
        self._loads: dict[PeerId, tuple[float, Load]] = {}
        self._started = 0

    # ------------------------------------------------------------ planning

    def candidates(
        self, avoid: frozenset[PeerId] = frozenset(), holding: Span | None = None
    ) -> list[Candidate]:
        now = self.swarm.kernel.now
        replays = replays_by_peer(asking.machine.replaying for asking in self.askings.values())
        found = []
        for peer, announced in self.swarm.announced.items():
            if peer in avoid or (holding is not None and not announced.span.holds(holding)):
                continue
            candidate = announced
            if peer in self.channels:
                rtt_ms = 2000 * (self.delay_s + self.swarm.delays[peer])
                candidate = msgspec.structs.replace(announced, rtt_ms=rtt_ms)
            if not self.swarm.petals and (peer in self._loads or self.ours[peer]):
                said = self._loads.get(peer)
                load = said[1] if said is not None and now - said[0] < LOAD_FRESH_S else None
                candidate = informed(candidate, load, self.ours[peer], replays.get(peer, ()))
            found.append(candidate)
        return found

    def ask(self, asking: Asking) -> None:
        """A user asks: compare two routes, ask the peers in which they differ, then open."""
        self._started += 1
        asking.session = f"{self.number:08x}{self._started:024x}"
        tokens = asking.prompt + asking.new
        if self.swarm.petals:
            self._start(asking, frozenset())
            return
        try:
            choice = two_choices(
                self.candidates(), self.swarm.layers, model="m", tokens=tokens, salt=asking.session
            )
        except CorollaError:
            self._start(asking, frozenset())
            return
        for peer in choice.ask:
            there = self.delay_s + self.swarm.delays.get(peer, 1.0)
            self.swarm.kernel.after(there, self._probed, peer, there)
        waits = [2 * (self.delay_s + self.swarm.delays.get(peer, 1.0)) for peer in choice.ask]
        delay_s = min(PROBE_S, max(waits, default=0.0) + 0.0001)
        self.swarm.kernel.after(delay_s, self._start, asking, choice.peers)

    def _probed(self, peer: PeerId, back_s: float) -> None:
        there = self.swarm.peers.get(peer)
        if there is not None:
            self.channels.add(peer)
            self.swarm.kernel.after(back_s, self._heard, peer, there.load())

    def _heard(self, peer: PeerId, load: Load) -> None:
        self._loads[peer] = self.swarm.kernel.now, load

    def _start(self, asking: Asking, compared: frozenset[PeerId]) -> None:
        tokens = asking.prompt + asking.new
        layers, salt = self.swarm.layers, asking.session

        def plan(
            survivors: Sequence[RouteSpan],
            avoid: frozenset[PeerId],
            held: Mapping[PeerId, int],
            replay: int,
        ) -> list[RouteSpan]:
            candidates = self.candidates(avoid)
            if self.swarm.petals:
                return petals.route(candidates, layers, tokens)
            if not survivors and not avoid and compared:
                among = [each for each in candidates if each.peer in compared]
                try:
                    return fill_route([], among, layers, model="m", tokens=tokens, salt=salt)
                except (NoRoute, Busy):
                    pass
            return fill_route(
                survivors, candidates, layers, model="m", tokens=tokens, salt=salt, replay=replay, held=held
            )

        def spare(entry: RouteSpan, avoid: frozenset[PeerId]) -> PeerId | None:
            if not self.swarm.standbys:
                return None
            holders = self.candidates(avoid, Span(entry.start, entry.end))
            return choose_standby(entry, holders, tokens=tokens, busiest=BUSY_STANDBY_MS)

        request = Request(artefact=ARTEFACT, prompt=range(asking.prompt), max_new_tokens=asking.new)
        asking.machine = ClientSession(
            asking.session, request, plan, spare=spare, clock=lambda: self.swarm.kernel.now
        )
        self.askings[asking.session] = asking
        self._carry_out(asking, asking.machine.start())

    # ------------------------------------------------------------ events and effects

    def received(self, peer: PeerId, session: str, message: PeerMessage) -> None:
        asking = self.askings.get(session)
        if asking is not None:
            self._handle(asking, Received(peer, message))

    def lost(self, peer: PeerId, died_at: float) -> None:
        """The channel to a peer closed."""
        self.channels.discard(peer)
        for asking in list(self.askings.values()):
            self._lost(asking, peer, died_at)

    def unreachable(self, session: str, peer: PeerId, died_at: float) -> None:
        if (asking := self.askings.get(session)) is not None:
            self._lost(asking, peer, died_at)

    def died(self, peer: PeerId) -> None:
        """A peer died at this moment, which nobody knows yet: only what is measured begins."""
        for asking in self.askings.values():
            self._count(asking, peer, self.swarm.kernel.now)

    def _count(self, asking: Asking, peer: PeerId, died_at: float) -> None:
        machine = asking.machine
        gone = next((span for span in machine.route if span.peer == peer), None)
        if gone is None:
            return
        if asking.died_at is None:
            asking.died_at, asking.died_in = died_at, machine.epoch
        layers = gone.start, gone.end
        ready = any((span.start, span.end) == layers for span in machine.standbys)
        asking.stood_by = asking.stood_by and ready

    def _lost(self, asking: Asking, peer: PeerId, died_at: float) -> None:
        self._count(asking, peer, died_at)
        self._handle(asking, PeerLost(peer))

    def _handle(self, asking: Asking, event: Event) -> None:
        self._carry_out(asking, asking.machine.handle(event))
        self._watch(asking)

    def _watch(self, asking: Asking) -> None:
        """Look at it again when its step would be late; most steps are in time, so seldom more than once."""
        if not asking.wakes and (wake_at := asking.machine.wake_at) is not None:
            asking.wakes = True
            self.swarm.kernel.after(max(0.0, wake_at - self.swarm.kernel.now), self._wake, asking)

    def _wake(self, asking: Asking) -> None:
        asking.wakes = False
        if asking.session in self.askings:
            self._carry_out(asking, asking.machine.wake())
            self._watch(asking)

    def _carry_out(self, asking: Asking, effects: Sequence[Effect]) -> None:
        busy = [*asking.machine.route, *asking.machine.standbys]
        if asking.route != busy:
            self.ours.subtract(span.peer for span in asking.route)
            asking.route = busy
            self.ours.update(span.peer for span in busy)
        for effect in effects:
            if isinstance(effect, Send):
                self.swarm.send(self, effect.peer, asking.session, effect.message)
            elif isinstance(effect, Emit):
                self._emitted(asking, effect.event)
            elif isinstance(effect, Finish):
                self._finished(asking, effect.error)

    def _emitted(self, asking: Asking, event: Drawn | Rerouted) -> None:
        now, told = self.swarm.kernel.now, self.swarm.told
        if isinstance(event, Rerouted):
            told.reroutes += 1
            return
        self.swarm.kernel.note("tok", event.position)
        if asking.died_at is not None and asking.machine.epoch > asking.died_in:
            (told.recoveries if asking.stood_by else told.replays).append(now - asking.died_at)
            asking.died_at, asking.stood_by = None, True
        told.positions += 1
        if asking.token_at is None:
            told.positions += asking.prompt
            told.first_tokens.append(now - asking.asked_at)
        else:
            told.gaps.append(now - asking.token_at)
        asking.token_at = now
        told.tokens += 1

    def _finished(self, asking: Asking, error: CorollaError | None) -> None:
        del self.askings[asking.session]
        told = self.swarm.told
        self.ours.subtract(span.peer for span in asking.route)
        if isinstance(error, Busy) and asking.token_at is None:
            told.busy += 1
            again = Asking(asking.user, asking.prompt, asking.new, asking.asked_at)
            self.swarm.kernel.after(AGAIN_S, self.ask, again)
            return
        if error is None:
            told.answers += 1
            told.hops.append(len(asking.machine.peers))
        else:
            told.failed += 1
            told.errors[f"{type(error).__name__}: {error}"] += 1
        self.swarm.answered(self, asking)
