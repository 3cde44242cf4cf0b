"""Any order of arrivals, repeats, stale words, kills, returns, expiries and hedges, against a line of model.

The asker's state machine is the real one; the hops are a miniature whose tokens depend on all inputs before.
So: the answer is the unsplit model's, token after token, whatever happens (I1, I2); nothing of an older epoch
is used (I5); every route covers all layers (I7); when it is over every hop that lives has forgotten it (I4);
and once the faults stop, it comes to an end (I3).
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.client.session import (
    ClientSession,
    Drawn,
    Effect,
    Emit,
    Finish,
    PeerLost,
    Received,
    Request,
    Rerouted,
    Send,
)
from shared.errors import NoRoute
from shared.identity import PeerId
from shared.protocol import Open, Token
from tests.shared.client.miniature import HALF, HEADS, LAYERS, TAILS, VOCABULARY, Miniature, unsplit

SESSION = "5" * 32
NEW = 12
ENOUGH = 20_000
peers = st.sampled_from([*HEADS, *TAILS])
places = st.integers(0, 100)


class AskerMachine(RuleBasedStateMachine):
    """One session, six peers, and a network that does what it is told."""

    @initialize(prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
    def ask(self, prompt: list[int]) -> None:
        self.swarm = Miniature()
        self.now = 0.0
        self.said: list[int] = []
        self.prompt = prompt
        self.finished: list[Finish] = []
        self.epochs = [0]
        self.told: list[tuple[PeerId, Token]] = []
        request = Request(artefact="0" * 64, prompt=prompt, max_new_tokens=NEW)
        self.session = ClientSession(
            SESSION, request, self.swarm.plan, spare=self.swarm.spare, clock=lambda: self.now
        )
        self.carry_out(self.session.start())

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert not self.finished, "an effect after the end"
            match effect:
                case Send(message=Open() as opened):
                    assert [(span.start, span.end) for span in opened.route] == [(0, HALF), (HALF, LAYERS)]
                    assert opened.epoch == self.session.epoch
                    self.swarm.asked(effect)
                case Send():
                    self.swarm.asked(effect)
                case Emit(event=Drawn() as drawn):
                    assert drawn.position == len(self.prompt) + len(self.said)
                    assert drawn.token == unsplit([*self.prompt, *self.said])
                    self.said.append(drawn.token)
                case Emit(event=Rerouted()):
                    assert self.session.epoch > self.epochs[-1]
                    self.epochs.append(self.session.epoch)
                case Finish():
                    self.finished.append(effect)

    def deliver(self, link: tuple[PeerId, PeerId]) -> None:
        source, _ = link
        arrived = self.swarm.deliver(link)
        if arrived is None:
            return
        if isinstance(arrived, str):
            self.carry_out(self.session.handle(PeerLost(PeerId(arrived))))
            return
        if isinstance(arrived, Token):
            self.told.append((source, arrived))
        self.carry_out(self.session.handle(Received(source, arrived)))  # type: ignore[arg-type]

    # ------------------------------------------------------------ what may happen

    @rule(place=places, count=st.integers(1, 12))
    def messages_arrive(self, place: int, count: int) -> None:
        for number in range(count):
            if waiting := self.swarm.waiting():
                self.deliver(waiting[(place + 7 * number) % len(waiting)])

    @precondition(lambda self: self.told)
    @rule(place=places, lie=st.booleans())
    def a_word_comes_again(self, place: int, lie: bool) -> None:
        """By another path, or from a hop of a route that is over, with what would be another token."""
        source, token = self.told[place % len(self.told)]
        stale = token.epoch < self.session.epoch - 1
        drawn = (token.token + 1) % VOCABULARY if lie and stale else token.token
        again = Token(SESSION, token.epoch, token.position, drawn)
        self.carry_out(self.session.handle(Received(source, again)))

    @rule(peer=peers)
    def a_peer_is_killed(self, peer: PeerId) -> None:
        if len(self.swarm.alive) > 2:
            self.swarm.kill(peer)

    @rule(peer=peers)
    def a_peer_comes_back_empty(self, peer: PeerId) -> None:
        self.swarm.alive.add(peer)

    @rule(peer=peers)
    def a_lease_runs_out(self, peer: PeerId) -> None:
        self.swarm.memory.pop(peer, None)

    @rule(seconds=st.floats(0.001, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if (wake_at := self.session.wake_at) is not None:
            self.now = max(self.now, wake_at)
            self.carry_out(self.session.wake())

    @rule()
    def the_lease_is_renewed(self) -> None:
        if not self.finished:
            self.carry_out(self.session.renew())

    # ------------------------------------------------------------ what must hold

    @invariant()
    def it_ends_at_most_once_and_well(self) -> None:
        assert len(self.finished) <= 1
        for finish in self.finished:
            # The only other end is an explicit one: there was nobody for some layers.
            assert finish.error is None or isinstance(finish.error, NoRoute)
            assert finish.error is not None or len(self.said) == NEW

    @invariant()
    def standbys_are_bounded(self) -> None:
        assert len(self.session.standbys) <= len(self.session.route)

    def teardown(self) -> None:
        """The faults stop: all peers are there, everything arrives, time goes on."""
        if not hasattr(self, "session"):
            return
        self.swarm.alive = {*HEADS, *TAILS}
        for number in range(ENOUGH):
            if waiting := self.swarm.waiting():
                self.deliver(waiting[number % len(waiting)])
            elif self.finished:
                break
            else:
                # A hop lost its memory with nothing on its way: only silence tells, and the asker's patience.
                self.now += 30.0
                if self.session.wake_at is None:
                    for peer in list(self.session.peers):
                        if peer not in self.swarm.memory:
                            self.carry_out(self.session.handle(PeerLost(peer)))
                            break
                    else:
                        break
                else:
                    self.carry_out(self.session.wake())
        assert self.finished, "no end, though the faults have stopped"
        assert not self.swarm.memory, "a hop still keeps the session"


AskerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestAsker = AskerMachine.TestCase
