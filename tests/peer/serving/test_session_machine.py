"""Any order of opens, steps, repeats, rewinds, grants, losses, expiries and closes, against a simple model.

The model of a session is its text: the tokens whose keys and values the peer must hold. What the peer says is
compared with the unsplit model's answer to that text. So tokens are exact, nothing comes of an older epoch, a
cache is as long as the text, memory never exceeds the budget, and none is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peer.serving import service as serving
from shared.protocol import Close, Consumed, Decline, Grant, Lost, Open, Opened, Renew, Step, Token
from tests.peer.serving.parties import (
    LAYERS,
    SOON_S,
    VOCABULARY,
    House,
    Party,
    expected_tokens,
    house,
    ids_body,
    span,
    step,
)

MAX_TOKENS = 24
SESSIONS = ["1" * 32, "2" * 32, "3" * 32]
ROOM = 2
"""Of three sessions, the budget has room for two."""
token_lists = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)


class Modelled:
    """What the asker of a session knows, and so what the peer must hold."""

    def __init__(self, epoch: int, credit: int) -> None:
        self.newest = epoch
        """The newest route that was opened."""
        self.taken = epoch
        """The one whose steps came last."""
        self.credit = credit
        self.prepared_credit = credit
        self.text: list[int] = []
        self.drawn: int | None = None
        """A token that waits for credit, while nothing has happened since."""
        self.last: tuple[Step, list[int]] | None = None


class SessionMachine(RuleBasedStateMachine):
    """Three sessions of one asker at a peer that has the whole model and room for two."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.model: dict[str, Modelled] = {}

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
        return self.loop.run_until_complete(asyncio.wait_for(work, SOON_S))

    @initialize()
    def move_in(self) -> None:
        held = span()
        self.session_bytes = MAX_TOKENS * held.kv_bytes_per_token(0, LAYERS)
        # One byte less than the third would need.
        room = house(held, kv_bytes=(ROOM + 1) * self.session_bytes - 1)
        self.house: House = self.do(self.stack.enter_async_context(room))
        self.asker: Party = self.house.party("asker")
        self.stranger: Party = self.house.party("stranger")

    def teardown(self) -> None:
        for session in list(self.model):
            self.do(self.asker.say(Close(session)))
        self.do(self.stack.aclose())
        self.loop.close()

    # ------------------------------------------------------------ opening and ending

    @rule(session=st.sampled_from(SESSIONS), ahead=st.integers(-1, 2), credit=st.integers(0, MAX_TOKENS))
    def open(self, session: str, ahead: int, credit: int) -> None:
        known = self.model.get(session)
        epoch = max(0, (known.newest if known else 1) + ahead)
        self.do(self.asker.say(self._opened(session, epoch, credit)))
        if known is not None and epoch <= known.newest:
            return  # an old one, or the same again
        if known is None and len(self.model) == ROOM:
            declined = self.do(self.asker.hear(Decline))
            assert (declined.session, declined.code) == (session, "busy") and declined.retry_after_s > 0
            return
        opened = self.do(self.asker.hear(Opened))
        if known is None:
            known = self.model[session] = Modelled(epoch, credit)
        known.newest, known.prepared_credit, known.drawn = epoch, credit, None
        assert (opened.session, opened.epoch, opened.position) == (session, epoch, len(known.text))

    def _opened(self, session: str, epoch: int, credit: int) -> Open:
        return self.house.open(session=session, epoch=epoch, credit=credit, max_tokens=MAX_TOKENS)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.model)))
        self.do(self.asker.say(Close(session)))
        del self.model[session]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """As when the asker was silent for longer than its lease."""
        session = data.draw(st.sampled_from(sorted(self.model)))
        self.house.service._admitted[session].deadline = 0.0
        self.do(self._gone(session))
        del self.model[session]

    async def _gone(self, session: str) -> None:
        while session in self.house.service._admitted:  # noqa: ASYNC110 - the sweep has no event
            await asyncio.sleep(0.005)

    # ------------------------------------------------------------ steps

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=token_lists, sample=st.booleans(), newest=st.booleans())
    def step(self, data: st.DataObject, tokens: list[int], sample: bool, newest: bool) -> None:
        """In order, or anywhere further back."""
        session = data.draw(st.sampled_from(sorted(self.model)))
        known = self.model[session]
        position = data.draw(st.integers(0, len(known.text)))
        count = min(len(tokens), MAX_TOKENS - 1 - position)
        if count < 1:
            return
        # While a newer route is prepared, the ring of the one before goes on, and prompts are left half way.
        epoch = known.newest if newest or count > 1 else known.taken
        asked = step(position, count, session=session, epoch=epoch, sample=sample)
        self._ask(known, asked, tokens[:count])

    @precondition(lambda self: any(known.last for known in self.model.values()))
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """The same step once more: it truncates, and gives the same."""
        session = data.draw(st.sampled_from(sorted(name for name in self.model if self.model[name].last)))
        known = self.model[session]
        assert known.last is not None
        asked, tokens = known.last
        goes_on = asked.count == 1 or asked.epoch == known.newest
        if asked.epoch == known.taken and goes_on and asked.position <= len(known.text):
            self._ask(known, asked, tokens)

    def _ask(self, known: Modelled, asked: Step, tokens: list[int]) -> None:
        self.do(self.asker.say(asked, ids_body(tokens)))
        if asked.epoch == known.newest != known.taken:
            known.taken = known.newest
            known.credit = max(known.credit, known.prepared_credit)
        known.text = known.text[: asked.position] + tokens
        known.last, known.drawn = (asked, tokens), None
        if asked.count > 1 or not asked.sample:
            done = self.do(self.asker.hear(Consumed))
            assert (done.session, done.epoch, done.position) == (asked.session, asked.epoch, len(known.text))
        if asked.sample:
            self._ring(asked.session, known)

    def _ring(self, session: str, known: Modelled) -> None:
        """Tokens come as long as credit lasts; the last one waits outside of the cache."""
        while True:
            (expected,) = expected_tokens(tuple(known.text), 1)
            token = self.do(self.asker.hear(Token))
            assert (token.session, token.epoch) == (session, known.taken)
            assert (token.position, token.token) == (len(known.text), expected)
            if token.position + 1 >= known.credit:
                known.drawn = expected
                return
            known.text.append(expected)

    @precondition(lambda self: any(known.drawn is not None for known in self.model.values()))
    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        waiting = sorted(name for name, known in self.model.items() if known.drawn is not None)
        session = data.draw(st.sampled_from(waiting))
        known = self.model[session]
        credit = data.draw(st.integers(0, MAX_TOKENS))
        self.do(self.asker.say(Grant(session, known.taken, credit)))
        known.credit = max(known.credit, credit)
        if len(known.text) + 1 < known.credit:
            assert known.drawn is not None
            known.text.append(known.drawn)
            known.drawn = None
            self._ring(session, known)

    # ------------------------------------------------------------ what must change nothing

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=token_lists)
    def step_of_another_epoch(self, data: st.DataObject, tokens: list[int]) -> None:
        session = data.draw(st.sampled_from(sorted(self.model)))
        known = self.model[session]
        past = [epoch for epoch in range(known.newest) if epoch != known.taken]
        if past:
            epoch = data.draw(st.sampled_from(past))
            self.do(self.asker.say(step(0, len(tokens), session=session, epoch=epoch), ids_body(tokens)))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=token_lists)
    def step_that_leaves_a_gap(self, data: st.DataObject, tokens: list[int]) -> None:
        session = data.draw(st.sampled_from(sorted(self.model)))
        known = self.model[session]
        ahead = step(len(known.text) + 1, len(tokens), session=session, epoch=known.taken)
        self.do(self.asker.say(ahead, ids_body(tokens)))
        lost = self.do(self.asker.hear(Lost))
        assert (lost.session, lost.peer) == (session, self.house.me)

    @rule(session=st.sampled_from(SESSIONS), tokens=token_lists)
    def step_of_no_session(self, session: str, tokens: list[int]) -> None:
        if session not in self.model:
            self.do(self.asker.say(step(0, len(tokens), session=session), ids_body(tokens)))
            assert self.do(self.asker.hear(Lost)).session == session

    @rule(session=st.sampled_from(SESSIONS), tokens=token_lists, kind=st.integers(0, 3))
    def stranger_speaks(self, session: str, tokens: list[int], kind: int) -> None:
        if session not in self.model:
            return
        known = self.model[session]
        match kind:
            case 0:
                said = step(0, len(tokens), session=session, epoch=known.taken, sample=True)
                self.do(self.stranger.say(said, ids_body(tokens)))
            case 1:
                self.do(self.stranger.say(Close(session)))
            case 2:
                self.do(self.stranger.say(Grant(session, known.taken, MAX_TOKENS)))
            case 3:
                self.do(self.stranger.say(Renew([session])))

    # ------------------------------------------------------------ what always holds

    @invariant()
    def the_peer_holds_what_the_model_says(self) -> None:
        if not hasattr(self, "house"):
            return
        self.do(self._settled())
        service, budget = self.house.service, self.house.budget
        assert set(service._admitted) == set(self.model)
        assert budget.reserved_bytes == len(self.model) * self.session_bytes <= budget.total_bytes
        for session, known in self.model.items():
            assert service._admitted[session].session.position == len(known.text)
        assert self.asker.heard_nothing and self.asker.makes_room.empty()

    async def _settled(self) -> None:
        """Nothing waits: neither for a session, nor for the batcher, nor on its way out."""
        for _ in range(3):
            await asyncio.sleep(0)
        # A session tells nobody that it is idle.
        while any(  # noqa: ASYNC110
            not each.session._inbox.empty() for each in self.house.service._admitted.values()
        ):
            await asyncio.sleep(0.001)


SessionMachine.TestCase.settings = settings(
    # The same every time: whoever looks for more raises the number and lets chance in.
    derandomize=True,
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.slow
class TestSessions(SessionMachine.TestCase):  # type: ignore[valid-type,misc]
    """Runs the machine; sessions are swept every few milliseconds, so that expiry is soon seen."""

    @classmethod
    def setUpClass(cls) -> None:
        cls._sweeps = serving.SWEEPS_PER_LEASE
        serving.SWEEPS_PER_LEASE = 5000

    @classmethod
    def tearDownClass(cls) -> None:
        serving.SWEEPS_PER_LEASE = cls._sweeps
