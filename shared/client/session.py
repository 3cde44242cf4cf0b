"""One session as its asker sees it: open a route, feed it, collect tokens, survive lost hops.

A state machine without clocks or sockets: it takes events and returns effects, so that a simulator can run
the very code that production runs. `generation.py` carries the effects out.

Recovery in one paragraph. Every hop keeps the hidden states that it sent on (its input log); the asker keeps
the token ids. When a hop is lost, the session takes a new route under the next epoch. Each hop of it answers
how many positions it holds; the first step of the epoch tells each what the next one holds, and whoever holds
more replays the rest from its log before it passes that step on. At the latest the last known token is fed
again, so a hop truncates by at most the few positions that were in flight, and no token is sampled again.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, assert_never

import msgspec

from shared.client.lateness import Lateness
from shared.client.standbys import Standby, Standbys
from shared.errors import Busy, CorollaError, NoRoute, ProtocolError, SessionFailed
from shared.framing import Priority
from shared.identity import PeerId, short
from shared.protocol import (
    PREFILL_CHUNK,
    PREFILL_WINDOW,
    TEE_ROWS,
    TEE_WINDOW,
    Close,
    Consumed,
    Decline,
    Failed,
    Grant,
    Hop,
    Likelihood,
    Locate,
    Lost,
    Open,
    Opened,
    PeerMessage,
    Renew,
    RouteSpan,
    Sampling,
    Scored,
    Step,
    Tee,
    Tensor,
    Token,
)

LOOK_EVERY = 32
"""Tokens after which hops without a standby are looked at again: somebody may have joined."""
FORGIVE_EVERY = 256
"""Tokens after which peers that were lost, or would not stand by, are thought of again."""
WORTH_A_STANDBY = 8
"""For fewer tokens than these to come, nobody is asked to follow."""
CLOSE = 64
"""A standby that lags behind by fewer positions can take over without a pause that anyone would see."""
AT_ONCE = 16
"""A standby that lags behind by fewer positions takes a lost hop's place without a thought. Of one that lags
more, the planner knows what it holds: a faster peer that replays everything may be the sooner one."""
LOOK_S = 0.2
"""How long hops may take to tell how far they are."""
MOST_LOOKS = 5
"""When so many times nothing could be done, the step is left alone."""
PATIENT_S = 1.0
GIVE_UP_S = 20.0
"""Hops that cannot be reached are tried again for so long; they keep what they hold for 30 s."""
CREDIT_WINDOW = 64
"""Tokens that the ring may run ahead of the asker; a vanished asker costs at most this much work."""


# ---------------------------------------------------------------- what the asker wants and gets


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One generation: token ids in, at most `max_new_tokens` ids out."""

    artefact: str
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: Sequence[int] = ()
    adapter: str = ""
    """The id of an adapter that peers host; empty for the model as it is."""


class Drawn(msgspec.Struct, frozen=True):
    """One new token with the hops that made it; a `stop` token ends the answer and has no text."""

    position: int
    token: int
    hops: Sequence[Hop]
    stop: bool
    likelihood: Likelihood | None = None
    prompt_likelihoods: Sequence[Likelihood] = ()
    """With the first token, if they were asked for: of all tokens of the prompt but the first."""


Reason = Literal["lost", "declined", "late", "leaving"]
"""Why a hop is left: it cannot be reached, has no room, does not answer in time, or goes away on purpose."""


class Rerouted(msgspec.Struct, frozen=True):
    """The session goes on along another route, without the hop `lost`."""

    lost: PeerId
    lost_span: tuple[int, int]
    route: Sequence[RouteSpan]
    reason: Reason = "lost"
    stood_by: bool = False
    """Whoever took over had followed all along."""


# ---------------------------------------------------------------- events and effects


class Received(msgspec.Struct, frozen=True):
    """A message of this session from a hop."""

    peer: PeerId
    message: PeerMessage
    at: float | None = None
    """When it came, by the session's clock; now, unless told."""


class PeerLost(msgspec.Struct, frozen=True):
    """The channel to a hop closed, or could not be opened."""

    peer: PeerId
    alive: bool = False
    """The peer itself closed it, or opened another one: it may well be there, with all that it holds."""


class Leaving(msgspec.Struct, frozen=True):
    """A peer has said that it goes away on purpose."""

    peer: PeerId


class Send(msgspec.Struct, frozen=True):
    """Give a message to a hop; messages to one hop keep their order."""

    peer: PeerId
    message: PeerMessage
    body: bytes = b""
    lane: Priority = Priority.CONTROL


class Emit(msgspec.Struct, frozen=True):
    """Hand something to the asker."""

    event: Drawn | Rerouted


class Finish(msgspec.Struct, frozen=True):
    """The session is over; None means that the answer is complete."""

    error: CorollaError | None = None


Event = Received | PeerLost | Leaving
Effect = Send | Emit | Finish
Planner = Callable[[Sequence[RouteSpan], frozenset[PeerId], Mapping[PeerId, int], int], list[RouteSpan]]
"""Given the spans that survive, the peers to avoid, what others hold already, and how many positions somebody
new has to compute first: a whole route. Raises NoRoute or Busy."""
Spare = Callable[[RouteSpan, frozenset[PeerId]], PeerId | None]
"""Given an entry of the route and the peers to avoid, one that may stand by for it, if there is any."""
PageNamer = Callable[[Sequence[int]], list[str]]
"""The names of the whole pages of a text."""


# ---------------------------------------------------------------- the machine


class ClientSession:
    """Feed it `start`, then events; carry out the effects in order until a Finish."""

    def __init__(
        self,
        session: str,
        request: Request,
        plan: Planner,
        name_pages: PageNamer = lambda tokens: [],
        *,
        spare: Spare = lambda entry, avoid: None,
        is_there: Callable[[PeerId], bool] = lambda peer: True,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.session = session
        self.epoch = 0
        self.route: list[RouteSpan] = []
        self.tokens = list(request.prompt)
        self._request = request
        self._plan = plan
        self._name_pages = name_pages
        self._spare = spare
        self._is_there = is_there
        self._clock = clock
        self._now = clock()
        """When the event came that is being handled."""
        self._limit = len(self.tokens) + request.max_new_tokens
        self._credit = 0
        self._unsent: deque[Send] = deque()
        """Steps of the prompt that wait until the first hop has consumed those before."""
        self._awaiting: set[PeerId] = set()
        self._held: dict[PeerId, int] = {}
        """What each hop of this epoch holds, by its own word."""
        self._expected: dict[PeerId, int] = {}
        """The same as it was known before it said so."""
        self._scored: dict[int, Likelihood] = {}
        """How likely each token of the prompt was, by its position; kept until the first token is drawn."""
        self._sure = self._limit
        """Positions that every hop holds as the asker knows them, should it hold so many."""
        self._before: tuple[int, PeerId] | None = None
        """The epoch fed before this one, and its last hop: its tokens count until this one's come."""
        self._last_hop = PeerId("")
        self._parting: set[PeerId] = set()
        """Peers that the route left; they go on until the new route has shown that it works."""
        self._proven = False
        """A token has come by the current route."""
        self._standbys = Standbys()
        self._followed = -1
        """The epoch in which standbys were asked to follow."""
        self._certain = 0
        """Positions that hold the tokens as the asker knows them, wherever they were computed."""
        self._unfit: set[PeerId] = set()
        """Peers that would not stand by when they were asked lately."""
        self._leaving: set[PeerId] = set()
        self._lateness = Lateness()
        self._since = self._now
        """When the step began that is awaited."""
        self._judge_at: float | None = None
        """When the hops were asked how far they are, the time to look at their answers."""
        self._places: dict[PeerId, int] = {}
        self._looks = 0
        """How often they were asked since the last token."""
        self._hedging = False
        """The present route was taken because a hop was late; its answer may still come first."""
        self._tried_at = self._now
        self._down_since: float | None = None
        """When the first hop was lost since the last token."""
        self._returns: set[PeerId] = set()
        """Hops that were opened anew, with all that they hold, since the last token."""
        self._losses: dict[PeerId, int] = {}
        self._refused: set[PeerId] = set()
        """Peers that declined since the session last ran: they may have room another time, not now."""
        self._state: Literal["opening", "running", "over"] = "opening"

    @property
    def peers(self) -> list[PeerId]:
        """The peers of the current route, in order."""
        return [PeerId(span.peer) for span in self.route]

    @property
    def standbys(self) -> list[RouteSpan]:
        """Who stands by, each for its layers."""
        return [standby.entry for standby in self._standbys if standby.ready]

    @property
    def running(self) -> bool:
        """True while every hop of the route has the session's memory."""
        return self._state == "running"

    @property
    def awaiting(self) -> frozenset[PeerId]:
        """The peers that have not answered the current `Open` yet; empty once the session runs."""
        return frozenset(self._awaiting if self._state == "opening" else ())

    @property
    def behind(self) -> dict[PeerId, int]:
        """How many positions those who stand by still lack, by their own word."""
        return {each.peer: self._lag(each) for each in self._standbys if each.ready}

    @property
    def replaying(self) -> dict[PeerId, int]:
        """Of a route that has not worked yet: how many positions each peer has to compute first."""
        if self._proven or self._state == "over":
            return {}
        held = self._expected | self._held
        return {peer: len(self.tokens) - held.get(peer, 0) for peer in self.peers}

    def start(self) -> list[Effect]:
        try:
            self.route = self._plan([], frozenset(), {}, 0)
        except CorollaError as error:
            return self._finish(error)
        return self._open()

    def handle(self, event: Event) -> list[Effect]:
        if self._state == "over":
            return []
        self._now = self._clock()
        match event:
            case PeerLost(peer=peer, alive=alive):
                return self._lose(peer, alive=alive)
            case Leaving(peer=peer):
                return self._part_from(peer)
            case Received(peer=peer, message=message):
                self._now = self._now if event.at is None else event.at
                return self._receive(peer, message)
            case _:
                assert_never(event)

    @property
    def wake_at(self) -> float | None:
        """When to call `wake`, should nothing happen until then."""
        if self._state != "running" or not self._proven:
            return None
        if self._judge_at is not None:
            return self._judge_at
        limit_s = self._lateness.limit_s
        if limit_s is None or not self.standbys or self._looks >= MOST_LOOKS:
            return None
        return self._since + limit_s

    def wake(self) -> list[Effect]:
        """The time that `wake_at` told has come."""
        self._now = self._clock()
        wake_at = self.wake_at
        if wake_at is None or self._now < wake_at:
            return []
        return self._look() if self._judge_at is None else self._judge()

    def cancel(self) -> list[Effect]:
        """The asker wants no more."""
        return [] if self._state == "over" else self._finish(None)

    def renew(self) -> list[Effect]:
        """Tell every hop that the session is still wanted; call it well within the lease."""
        if self._state == "over":
            return []
        return [Send(peer, Renew([self.session])) for peer in (*self.peers, *self._standbys.peers)]

    # ------------------------------------------------------------ opening

    def _open(self) -> list[Effect]:
        if self._state == "running":
            self._before = self.epoch - 1, self._last_hop
        self._last_hop = self.peers[-1]
        self._state = "opening"
        self._proven = False
        self._judge_at = None
        self._tried_at = self._now
        self._unsent.clear()
        self._awaiting = set(self.peers)
        self._held.clear()
        self._credit = self._next_credit()
        pages = self._pages()
        return [
            Send(peer, self._open_message(index, self.route, pages)) for index, peer in enumerate(self.peers)
        ]

    def _open_message(
        self, index: int, route: list[RouteSpan], pages: list[str], *, standby: bool = False
    ) -> Open:
        request = self._request
        is_last = index == len(route) - 1
        return Open(
            session=self.session,
            epoch=self.epoch,
            artefact=request.artefact,
            route=route,
            index=index,
            max_tokens=self._limit,
            prompt_length=len(request.prompt),
            credit=self._credit,
            sampling=request.sampling if is_last else Sampling(),
            stop_tokens=list(request.stop_tokens),
            history=self._history() if is_last and not standby else [],
            pages=pages,
            standby=standby,
            adapter=request.adapter,
        )

    def _pages(self) -> list[str]:
        """The names of the tokens so far. Pages that an earlier session computed would not be scored."""
        return [] if self._scores_missing() else self._name_pages(self.tokens)

    def _history(self) -> list[int]:
        """What the last hop must know of the tokens so far. Nobody but the first hop needs all of them."""
        sampling = self._request.sampling
        if not sampling.needs_history:
            return []
        return self.tokens[0 if sampling.needs_prompt else len(self._request.prompt) :]

    def _opened(self, peer: PeerId, position: int) -> list[Effect]:
        self._awaiting.discard(peer)
        self._held[peer] = position
        if self._awaiting:
            return []
        self._state = "running"
        self._refused.clear()
        return self._feed()

    def _feed(self) -> list[Effect]:
        """Bring the ring to the point where it draws the next token."""
        # The last position is computed again in any case: a token comes of nothing else.
        most = min(len(self.tokens) - 1, self._sure)
        if self._scores_missing():
            # Each comes of the position before its token.
            most = next(place for place in range(len(self.tokens)) if place + 1 not in self._scored)
        held = [min(self._held[peer], most) for peer in self.peers]
        self._sure = self._limit
        self._certain = most
        self._since = self._now
        self._unsent += self._steps(held)
        return self._sendable(held[0])

    def _sendable(self, consumed: int) -> list[Effect]:
        """The steps that may go now that the first hop is done with those before `consumed`."""
        effects: list[Effect] = []
        while self._unsent and _end_of(self._unsent[0]) <= consumed + PREFILL_WINDOW:
            effects.append(self._unsent.popleft())
        return effects

    def _steps(self, held: list[int]) -> list[Send]:
        """All from what the first hop holds to the last known token, which draws the next one."""
        start, end = held[0], len(self.tokens)
        return [
            self._step(position, min(position + PREFILL_CHUNK, end), held if position == start else [])
            for position in range(start, end, PREFILL_CHUNK)
        ]

    def _step(self, start: int, end: int, held: list[int]) -> Send:
        step = msgspec.structs.replace(
            self._tokens_step(start, end), sample=end == len(self.tokens), held=held
        )
        return Send(self.peers[0], step, self._ids(start, end), Priority.PREFILL)

    def _tokens_step(self, start: int, end: int) -> Step:
        """Of the token ids of these positions, which `_ids` holds."""
        return Step(
            session=self.session,
            epoch=self.epoch,
            position=start,
            count=end - start,
            tensor=Tensor("int32", [end - start]),
        )

    def _ids(self, start: int, end: int) -> bytes:
        return array("i", self.tokens[start:end]).tobytes()

    # ------------------------------------------------------------ running

    def _receive(self, peer: PeerId, message: PeerMessage) -> list[Effect]:
        if isinstance(message, Token) and (message.epoch, peer) == self._before:
            return self._drawn_before(message)
        if (standby := self._standbys.find(peer)) is not None:
            return self._from_standby(standby, message)
        if peer not in self.peers:
            return []  # a peer that the route left may be slow to hear of it, or not be honest
        match message:
            case Opened(epoch=epoch) if epoch == self.epoch and self._state == "opening":
                return self._opened(peer, message.position)
            case Consumed(epoch=epoch) if epoch == self.epoch:
                return self._consumed(peer, message.position)
            case Scored(epoch=epoch) if epoch == self.epoch and peer == self.peers[-1]:
                return self._take_scores(message)
            case Token(epoch=epoch) if epoch == self.epoch and peer == self.peers[-1]:
                return self._drawn(message)
            case Decline(epoch=epoch) if epoch == self.epoch:
                return self._declined(peer, message)
            case Failed(epoch=epoch) if epoch == self.epoch:
                return self._finish(SessionFailed(f"peer {short(peer)} could not go on: {message.message}"))
            case Lost(epoch=epoch) if epoch == self.epoch:
                # Our own channel to it is open, so perhaps only theirs broke.
                return self._lose(PeerId(message.peer), alive=True)
            case _:
                return []  # of an epoch that is over

    def _scores_missing(self) -> bool:
        """True while the prompt is to be scored and is not yet, not all of it."""
        wanted = len(self._request.prompt) - 1 if self._request.sampling.prompt_likelihoods else 0
        return len(self.tokens) == len(self._request.prompt) and len(self._scored) < wanted

    def _take_scores(self, scored: Scored) -> list[Effect]:
        if len(self.tokens) > len(self._request.prompt):
            return []
        for position, likelihood in enumerate(scored.likelihoods, scored.position):
            if not 0 < position < len(self._request.prompt) or self.tokens[position] != likelihood.token:
                return self._finish(ProtocolError("a peer scored a token that is not in the prompt"))
            self._scored[position] = likelihood
        return []

    def _prompt_likelihoods(self) -> Sequence[Likelihood]:
        """With the first token. Raises ProtocolError when some are missing."""
        count = len(self._request.prompt)
        if not self._request.sampling.prompt_likelihoods or len(self.tokens) > count:
            return ()
        if len(self._scored) != count - 1:
            raise ProtocolError(f"a peer scored {len(self._scored)} tokens of the prompt, not {count - 1}")
        scored = [self._scored[position] for position in range(1, count)]
        self._scored.clear()
        return scored

    def _drawn(self, token: Token) -> list[Effect]:
        settled = self._settle()
        if token.position < len(self.tokens):
            # The epoch before was faster. The same logits draw the same token; other hardware may round them
            # to another one, and then what was shown counts.
            agreed = self.tokens[token.position] == token.token
            return settled if agreed else settled + self._go_back(token.position)
        if token.position > len(self.tokens):
            return self._finish(
                ProtocolError(f"a token for position {token.position} came, expected {len(self.tokens)}")
            )
        return settled + self._take(token)

    def _drawn_before(self, token: Token) -> list[Effect]:
        """A route that is being left still answered."""
        # The new last hop knows the tokens up to its `Open`, and penalties count all.
        if token.position != len(self.tokens) or self._request.sampling.needs_history:
            return []
        if self._hedging:
            self._hedging = False
            self._lateness.in_vain()
        return self._take(token)

    def _take(self, token: Token) -> list[Effect]:
        try:
            prompt = self._prompt_likelihoods()
        except ProtocolError as error:
            return self._finish(error)
        if self._proven:
            self._lateness.took(self._now - self._since)
        self._since = self._now
        self._judge_at = None
        self._looks = 0
        self.tokens.append(token.token)
        drawn: list[Effect] = [
            Emit(Drawn(token.position, token.token, token.hops, token.stop, token.likelihood, prompt))
        ]
        if token.stop or len(self.tokens) >= self._limit:
            return drawn + self._finish(None)
        return drawn + self._grant() + self._keep_standbys()

    def _settle(self) -> list[Effect]:
        """The route works: who is not on it any more may go."""
        if self._proven:
            return []
        self._proven = True
        self._before = None
        self._hedging = False
        self._down_since = None
        self._returns.clear()
        return self._part()

    def _part(self) -> list[Effect]:
        parting, self._parting = self._parting, set()
        return [Send(peer, Close(self.session)) for peer in sorted(parting)]

    def _go_back(self, position: int) -> list[Effect]:
        """Open the same route anew: what it computed from `position` on is of tokens that were not shown."""
        self._sure = position
        self.epoch += 1
        opening = self._open()
        self._before = None  # its tokens follow the one that was not shown
        return opening

    def _grant(self) -> list[Effect]:
        if self._credit >= self._limit or self._credit - len(self.tokens) > CREDIT_WINDOW // 2:
            return []
        self._credit = self._next_credit()
        self._since = self._clock()  # the ring may have stood still until now, for want of it
        return [Send(self.peers[0], Grant(self.session, self.epoch, self._credit))]

    def _next_credit(self) -> int:
        return min(self._limit, len(self.tokens) + CREDIT_WINDOW)

    # ------------------------------------------------------------ standbys

    def _keep_standbys(self) -> list[Effect]:
        """After a token: find standbys, and give the one of the first hop its token ids."""
        if not self._proven:
            return []
        look = self._followed != self.epoch or len(self.tokens) % LOOK_EVERY == 0
        self._followed = self.epoch
        if len(self.tokens) % FORGIVE_EVERY == 0:
            self._unfit.clear()
            self._losses.clear()
            self._leaving.clear()
        first = self._standbys.of(self.route[0])
        return (self._stand_by() if look else []) + (self._feed_standby(first) if first else [])

    def _stand_by(self) -> list[Effect]:
        """Ask for a standby for every hop without one, and bring the others into this epoch."""
        if not self._proven or self._limit - len(self.tokens) < WORTH_A_STANDBY:
            return []
        effects = self._dismiss_useless()
        for index, entry in enumerate(self.route):
            standby = self._standbys.of(entry) or self._recruit(entry)
            if standby is not None and self._falls_behind(standby) and (other := self._another(entry)):
                self._unfit.add(standby.peer)
                effects += self._dismiss(standby)
                standby = self._standbys.add(other, entry)
            if standby is None or standby.epoch == self.epoch:
                continue
            standby.epoch = self.epoch
            route = [*self.route[:index], standby.entry, *self.route[index + 1 :]]
            pages = self._name_pages(self.tokens)
            effects.append(Send(standby.peer, self._open_message(index, route, pages, standby=True)))
        return effects

    def _recruit(self, entry: RouteSpan) -> Standby | None:
        peer = self._another(entry)
        return None if peer is None else self._standbys.add(peer, entry)

    def _another(self, entry: RouteSpan) -> PeerId | None:
        """Somebody who could stand by and does nothing for this session yet."""
        known = {*self.peers, *self._standbys.peers, *self._parting, *self._leaving}
        return self._spare(entry, frozenset(known | set(self._losses) | self._unfit))

    def _falls_behind(self, standby: Standby) -> bool:
        """True when it lags far and came no closer while so many tokens were drawn."""
        if not standby.ready or standby.epoch != self.epoch:
            return False
        lag, before = self._lag(standby), standby.lags.get(len(self.tokens) - LOOK_EVERY)
        standby.lags[len(self.tokens)] = lag
        return before is not None and lag >= max(CLOSE, before)

    def _dismiss_useless(self) -> list[Effect]:
        layers = {(span.start, span.end) for span in self.route}
        useless = [each for each in self._standbys if (each.start, each.end) not in layers]
        return [effect for standby in useless for effect in self._dismiss(standby)]

    def _dismiss(self, standby: Standby) -> list[Effect]:
        self._standbys.drop(standby)
        return [Send(standby.peer, Close(self.session))]

    def _from_standby(self, standby: Standby, message: PeerMessage) -> list[Effect]:
        match message:
            case Opened(epoch=epoch, position=position):
                standby.ready = True
                standby.position = min(position, self._certain)
                return self._copy_to(standby) + self._hand_over() if epoch == self.epoch else []
            case Consumed(epoch=epoch, position=position) if epoch == self.epoch:
                standby.position = max(standby.position, position)
                is_first = (standby.start, standby.end) == (self.route[0].start, self.route[0].end)
                return (self._feed_standby(standby) if is_first else []) + self._hand_over()
            case Decline() | Failed() | Lost():
                # Nobody sees a pause for it, so nobody is told.
                self._unfit.add(standby.peer)
                return self._dismiss(standby) + self._stand_by()
            case _:
                return []

    def _copy_to(self, standby: Standby) -> list[Effect]:
        """From now on it follows: the hop before it sends copies, or we do to that of the first hop."""
        for index, entry in enumerate(self.route):
            if self._standbys.of(entry) is standby and index:
                tee = Tee(self.session, self.epoch, standby.peer, standby.position)
                return [Send(self.peers[index - 1], tee)]
        standby.sent = standby.position
        return self._feed_standby(standby)

    def _feed_standby(self, standby: Standby) -> list[Effect]:
        """The token ids that the standby of the first hop may be sent now."""
        effects: list[Effect] = []
        if standby.epoch != self.epoch or not standby.ready:
            return effects
        while True:
            start = standby.sent
            end = min(start + PREFILL_CHUNK, len(self.tokens), standby.position + TEE_WINDOW)
            if end - start < TEE_ROWS:
                return effects
            standby.sent = end
            step = self._tokens_step(start, end)
            effects.append(Send(standby.peer, step, self._ids(start, end), Priority.BACKGROUND))

    # ------------------------------------------------------------ leaving a hop that is there

    def _part_from(self, peer: PeerId) -> list[Effect]:
        """A peer goes away on purpose: hand over what it does to one that follows, once there is one."""
        self._leaving.add(peer)
        if (standby := self._standbys.find(peer)) is not None:
            return self._dismiss(standby) + self._stand_by()
        if peer not in self.peers:
            return []
        return self._hand_over() or self._stand_by()

    def _hand_over(self) -> list[Effect]:
        if not self._proven:
            return []
        for entry in self.route:
            standby = self._standbys.of(entry)
            if entry.peer in self._leaving and standby is not None and self._is_close(standby):
                route = self._without(PeerId(entry.peer), standby)
                return self._go_by(route, PeerId(entry.peer), "leaving", stood_by=True)
        return []

    def _is_close(self, standby: Standby) -> bool:
        """True when nobody would see a pause if it became a hop now."""
        return standby.ready and standby.epoch == self.epoch and self._lag(standby) < CLOSE

    def _lag(self, standby: Standby) -> int:
        """How many positions it still lacks, by its own word."""
        return len(self.tokens) - standby.position

    def _look(self) -> list[Effect]:
        """The step is late: ask every hop how far it is."""
        self._judge_at = self._now + LOOK_S
        self._looks += 1
        self._places.clear()
        return [Send(peer, Locate(self.session)) for peer in self.peers]

    def _consumed(self, peer: PeerId, position: int) -> list[Effect]:
        further = self._sendable(position) if peer == self.peers[0] else []
        if self._judge_at is None:
            return further
        self._places[peer] = position
        return further if len(self._places) < len(self.peers) else further + self._judge()

    def _judge(self) -> list[Effect]:
        """Ask the standby of the hop that is late too: whoever answers first counts, and the ring goes on
        through the standby. The late one follows from now on, if it is there."""
        self._judge_at = None
        self._since = self._now
        for entry in self.route:
            peer = PeerId(entry.peer)
            if self._places.get(peer, 0) >= len(self.tokens):
                continue
            standby = self._standbys.of(entry)
            if standby is None or not self._is_close(standby):
                return []
            self._lateness.spend()
            effects = self._go_by(self._without(peer, standby), peer, "late", stood_by=True)
            self._hedging = True
            self._parting.discard(peer)
            self._standbys.add(peer, entry)
            return effects
        return []  # all have done their part: the token is on its way

    # ------------------------------------------------------------ losing and ending

    def _declined(self, peer: PeerId, decline: Decline) -> list[Effect]:
        retry_s = decline.retry_after_s
        if decline.code == "busy":
            full = f"every peer that could take this is full; try again in {retry_s:.0f} s"
            return self._reroute(peer, Busy(full, retry_s))
        if decline.code in ("draining", "layers", "artefact"):
            return self._reroute(peer, Busy(decline.message, retry_s))
        return self._finish(SessionFailed(f"peer {short(peer)} declined: {decline.message}"))

    def _lose(self, peer: PeerId, *, alive: bool = False) -> list[Effect]:
        if (standby := self._standbys.find(peer)) is not None:
            self._losses[peer] = self._losses.get(peer, 0) + 1
            return self._dismiss(standby) + self._stand_by()
        if peer not in self.peers:
            return []
        entry = self.route[self.peers.index(peer)]
        stood_by = self._standbys.ready(entry) is not None
        if alive and not stood_by and peer not in self._returns and self._is_there(peer):
            # It is there, and so is what it holds: cheaper than a replay by another one.
            self._returns.add(peer)
            return self._go_by(self.route, peer, "lost")
        return self._reroute(peer, None)

    def _reroute(self, lost: PeerId, refusal: Busy | None) -> list[Effect]:
        gone = self.route[self.peers.index(lost)]
        if refusal is None:
            self._count_loss(lost)
        else:
            self._refused.add(lost)
        standby = self._standbys.ready(gone)
        if standby is not None and self._lag(standby) < AT_ONCE:
            return self._go_by(self._without(lost, standby), lost, "lost", stood_by=True)
        try:
            route = self._replan(lost, last_resort=standby is None)
        except CorollaError as error:
            if standby is not None:
                return self._go_by(self._without(lost, standby), lost, "lost", stood_by=True)
            return self._finish(refusal or error if isinstance(error, NoRoute) else error)
        stood_by = standby is not None and standby.entry in route
        return self._go_by(route, lost, "declined" if refusal else "lost", stood_by=stood_by)

    def _count_loss(self, lost: PeerId) -> None:
        """Once lost, a peer is avoided; lost again and again, it is not even the last resort."""
        self._down_since = self._now if self._down_since is None else self._down_since
        before = self._losses.get(lost, 0)
        waited = self._now - self._tried_at > PATIENT_S and self._now - self._down_since < GIVE_UP_S
        # Who only does not answer may be there: perhaps our own network is away for a moment.
        self._losses[lost] = max(before, 1) if waited else before + 1

    def _without(self, peer: PeerId, standby: Standby) -> list[RouteSpan]:
        return [standby.entry if span.peer == peer else span for span in self.route]

    def _go_by(
        self, route: list[RouteSpan], lost: PeerId, reason: Reason, *, stood_by: bool = False
    ) -> list[Effect]:
        """Take another route under the next epoch."""
        gone = self.route[self.peers.index(lost)]
        known = dict.fromkeys(self.peers, len(self.tokens)) if self._proven else self._expected | self._held
        self._expected = {peer: held for peer, held in known.items() if peer != lost}
        for entry in route:
            if (standby := self._standbys.find(PeerId(entry.peer))) is not None:
                self._expected[standby.peer] = standby.position
                self._standbys.drop(standby)
        left = {*self._parting, *self.peers} - {PeerId(span.peer) for span in route}
        refused = left & self._refused
        self._parting = left - refused
        self.route = route
        self.epoch += 1
        closes = [Send(peer, Close(self.session)) for peer in sorted(refused)]
        rerouted = Rerouted(lost, (gone.start, gone.end), route, reason, stood_by)
        return [*closes, Emit(rerouted), *self._open()]

    def _replan(self, lost: PeerId, *, last_resort: bool) -> list[RouteSpan]:
        survivors = [span for span in self.route if span.peer != lost]
        held = {standby.peer: standby.position for standby in self._standbys if standby.ready}
        try:
            return self._plan(survivors, frozenset(self._losses) | self._refused, held, len(self.tokens))
        except NoRoute:
            # Perhaps only a link broke: a peer that was lost once and is still announced gets another try.
            twice = frozenset(peer for peer, losses in self._losses.items() if losses > 1)
            if not last_resort or twice == frozenset(self._losses):
                raise
            return self._plan(survivors, twice | self._refused, held, len(self.tokens))

    def _finish(self, error: CorollaError | None) -> list[Effect]:
        self._state = "over"
        pages = self._name_pages(self.tokens) if error is None else []
        served = (*self.peers, *sorted(self._standbys.peers))
        closes: list[Effect] = [Send(peer, Close(self.session, pages)) for peer in served]
        return [*self._part(), *closes, Finish(error)]


def _end_of(send: Send) -> int:
    """The position behind the last one of a step."""
    assert isinstance(send.message, Step)
    return send.message.position + send.message.count
