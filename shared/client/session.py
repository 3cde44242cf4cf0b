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
from collections.abc import Callable, Sequence
from typing import Literal, assert_never

import msgspec

from shared.errors import Busy, CorollaError, NoRoute, ProtocolError, SessionFailed
from shared.identity import PeerId, short
from shared.protocol import (
    PREFILL_CHUNK,
    PREFILL_WINDOW,
    Close,
    Consumed,
    Decline,
    Failed,
    Grant,
    Hop,
    Lost,
    Open,
    Opened,
    PeerMessage,
    Renew,
    RouteSpan,
    Sampling,
    Step,
    Tensor,
    Token,
)

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


class Drawn(msgspec.Struct, frozen=True):
    """One new token with the hops that made it; a `stop` token ends the answer and has no text."""

    position: int
    token: int
    hops: Sequence[Hop]
    stop: bool


class Rerouted(msgspec.Struct, frozen=True):
    """The session goes on along another route: `lost` could not be reached any more, or had no room."""

    lost: PeerId
    lost_span: tuple[int, int]
    route: Sequence[RouteSpan]
    declined: bool = False


# ---------------------------------------------------------------- events and effects


class Received(msgspec.Struct, frozen=True):
    """A message of this session from a hop."""

    peer: PeerId
    message: PeerMessage


class PeerLost(msgspec.Struct, frozen=True):
    """The channel to a hop closed, or could not be opened."""

    peer: PeerId


class Send(msgspec.Struct, frozen=True):
    """Give a message to a hop; messages to one hop keep their order."""

    peer: PeerId
    message: PeerMessage
    body: bytes = b""
    prefill: bool = False


class Emit(msgspec.Struct, frozen=True):
    """Hand something to the asker."""

    event: Drawn | Rerouted


class Finish(msgspec.Struct, frozen=True):
    """The session is over; None means that the answer is complete."""

    error: CorollaError | None = None


Event = Received | PeerLost
Effect = Send | Emit | Finish
Planner = Callable[[Sequence[RouteSpan], frozenset[PeerId]], list[RouteSpan]]
"""Given the spans that survive and the peers to avoid, a whole route. Raises NoRoute or Busy."""
PageNamer = Callable[[Sequence[int]], list[str]]
"""The names of the whole pages of a text."""


# ---------------------------------------------------------------- the machine


class ClientSession:
    """Feed it `start`, then events; carry out the effects in order until a Finish."""

    def __init__(
        self, session: str, request: Request, plan: Planner, name_pages: PageNamer = lambda tokens: []
    ) -> None:
        self.session = session
        self.epoch = 0
        self.route: list[RouteSpan] = []
        self.tokens = list(request.prompt)
        self._request = request
        self._plan = plan
        self._name_pages = name_pages
        self._limit = len(self.tokens) + request.max_new_tokens
        self._credit = 0
        self._unsent: deque[Send] = deque()
        """Steps of the prompt that wait until the first hop has consumed those before."""
        self._awaiting: set[PeerId] = set()
        self._held: dict[PeerId, int] = {}
        """What each hop of this epoch holds, by its own word."""
        self._sure = self._limit
        """Positions that every hop holds as the asker knows them, should it hold so many."""
        self._before: tuple[int, PeerId] | None = None
        """The epoch fed before this one, and its last hop: its tokens count until this one's come."""
        self._last_hop = PeerId("")
        self._parting: set[PeerId] = set()
        """Peers that the route left; they go on until the new route has shown that it works."""
        self._losses: dict[PeerId, int] = {}
        self._refused: set[PeerId] = set()
        """Peers that declined since the session last ran: they may have room another time, not now."""
        self._state: Literal["opening", "running", "over"] = "opening"

    @property
    def peers(self) -> list[PeerId]:
        """The peers of the current route, in order."""
        return [PeerId(span.peer) for span in self.route]

    @property
    def running(self) -> bool:
        """True while every hop of the route has the session's memory."""
        return self._state == "running"

    @property
    def awaiting(self) -> frozenset[PeerId]:
        """The peers that have not answered the current `Open` yet; empty once the session runs."""
        return frozenset(self._awaiting if self._state == "opening" else ())

    def start(self) -> list[Effect]:
        try:
            self.route = self._plan([], frozenset())
        except CorollaError as error:
            return self._finish(error)
        return self._open()

    def handle(self, event: Event) -> list[Effect]:
        if self._state == "over":
            return []
        match event:
            case PeerLost(peer=peer):
                return self._lose(peer)
            case Received(peer=peer, message=message):
                return self._receive(peer, message)
            case _:
                assert_never(event)

    def cancel(self) -> list[Effect]:
        """The asker wants no more."""
        return [] if self._state == "over" else self._finish(None)

    def renew(self) -> list[Effect]:
        """Tell every hop that the session is still wanted; call it well within the lease."""
        if self._state == "over":
            return []
        return [Send(peer, Renew([self.session])) for peer in self.peers]

    # ------------------------------------------------------------ opening

    def _open(self) -> list[Effect]:
        if self._state == "running":
            self._before = self.epoch - 1, self._last_hop
        self._last_hop = self.peers[-1]
        self._state = "opening"
        self._unsent.clear()
        self._awaiting = set(self.peers)
        self._held.clear()
        self._credit = self._next_credit()
        pages = self._name_pages(self.tokens)
        return [Send(peer, self._open_message(index, pages)) for index, peer in enumerate(self.peers)]

    def _open_message(self, index: int, pages: list[str]) -> Open:
        request = self._request
        is_last = index == len(self.route) - 1
        return Open(
            session=self.session,
            epoch=self.epoch,
            artefact=request.artefact,
            route=self.route,
            index=index,
            max_tokens=self._limit,
            prompt_length=len(request.prompt),
            credit=self._credit,
            sampling=request.sampling,
            stop_tokens=list(request.stop_tokens),
            history=list(self.tokens) if is_last and request.sampling.needs_history else [],
            pages=pages,
        )

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
        held = [min(self._held[peer], most) for peer in self.peers]
        self._sure = self._limit
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
        step = Step(
            session=self.session,
            epoch=self.epoch,
            position=start,
            count=end - start,
            tensor=Tensor("int32", [end - start]),
            sample=end == len(self.tokens),
            held=held,
        )
        return Send(self.peers[0], step, array("i", self.tokens[start:end]).tobytes(), prefill=True)

    # ------------------------------------------------------------ running

    def _receive(self, peer: PeerId, message: PeerMessage) -> list[Effect]:
        if isinstance(message, Token) and (message.epoch, peer) == self._before:
            return self._drawn_before(message)
        if peer not in self.peers:
            return []  # a peer that the route left may be slow to hear of it, or not be honest
        match message:
            case Opened(epoch=epoch) if epoch == self.epoch and self._state == "opening":
                return self._opened(peer, message.position)
            case Consumed(epoch=epoch) if epoch == self.epoch and peer == self.peers[0]:
                return self._sendable(message.position)
            case Token(epoch=epoch) if epoch == self.epoch and peer == self.peers[-1]:
                return self._drawn(message)
            case Decline(epoch=epoch) if epoch == self.epoch:
                return self._declined(peer, message)
            case Failed(epoch=epoch) if epoch == self.epoch:
                return self._finish(SessionFailed(f"peer {short(peer)} could not go on: {message.message}"))
            case Lost(epoch=epoch) if epoch == self.epoch:
                return self._lose(PeerId(message.peer))
            case _:
                return []  # of an epoch that is over

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
        return self._take(token)

    def _take(self, token: Token) -> list[Effect]:
        self.tokens.append(token.token)
        drawn: list[Effect] = [Emit(Drawn(token.position, token.token, token.hops, token.stop))]
        if token.stop or len(self.tokens) >= self._limit:
            return drawn + self._finish(None)
        return drawn + self._grant()

    def _settle(self) -> list[Effect]:
        """The new route works: who is not on it any more may go."""
        self._before = None
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
        return [Send(self.peers[0], Grant(self.session, self.epoch, self._credit))]

    def _next_credit(self) -> int:
        return min(self._limit, len(self.tokens) + CREDIT_WINDOW)

    # ------------------------------------------------------------ losing and ending

    def _declined(self, peer: PeerId, decline: Decline) -> list[Effect]:
        retry_s = decline.retry_after_s
        if decline.code == "busy":
            full = f"every peer that could take this is full; try again in {retry_s:.0f} s"
            return self._reroute(peer, Busy(full, retry_s))
        if decline.code in ("draining", "layers", "artefact"):
            return self._reroute(peer, Busy(decline.message, retry_s))
        return self._finish(SessionFailed(f"peer {short(peer)} declined: {decline.message}"))

    def _lose(self, peer: PeerId) -> list[Effect]:
        if peer not in self.peers:
            return []
        return self._reroute(peer, None)

    def _reroute(self, lost: PeerId, refusal: Busy | None) -> list[Effect]:
        gone = self.route[self.peers.index(lost)]
        if refusal is None:
            self._losses[lost] = self._losses.get(lost, 0) + 1
        else:
            self._refused.add(lost)
        try:
            route = self._replan(lost)
        except NoRoute as error:
            return self._finish(refusal or error)
        except CorollaError as error:
            return self._finish(error)
        left = {*self._parting, *self.peers} - {PeerId(span.peer) for span in route}
        refused = left & self._refused
        self._parting = left - refused
        self.route = route
        self.epoch += 1
        rerouted = Rerouted(lost, (gone.start, gone.end), self.route, declined=refusal is not None)
        closes = [Send(peer, Close(self.session)) for peer in sorted(refused)]
        return [*closes, Emit(rerouted), *self._open()]

    def _replan(self, lost: PeerId) -> list[RouteSpan]:
        survivors = [span for span in self.route if span.peer != lost]
        try:
            return self._plan(survivors, frozenset(self._losses) | self._refused)
        except NoRoute:
            # Perhaps only a link broke: a peer that was lost once and is still announced gets another try.
            twice = frozenset(peer for peer, losses in self._losses.items() if losses > 1)
            if twice == frozenset(self._losses):
                raise
            return self._plan(survivors, twice | self._refused)

    def _finish(self, error: CorollaError | None) -> list[Effect]:
        self._state = "over"
        pages = self._name_pages(self.tokens) if error is None else []
        closes: list[Effect] = [Send(peer, Close(self.session, pages)) for peer in self.peers]
        return [*self._settle(), *closes, Finish(error)]


def _end_of(send: Send) -> int:
    """The position behind the last one of a step."""
    assert isinstance(send.message, Step)
    return send.message.position + send.message.count
