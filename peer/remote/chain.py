"""Passes through peers that hold a model's layers, one after another, and what to do when one is lost.

Inputs of every span are kept until the pass is over. A span whose peer is lost is computed elsewhere from
them, by one peer or by several; so gradients are exact, or there are none.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from peer.remote.carried import Carried, Loan
from peer.wire_tensors import pack, unpack
from shared.channel import Priority
from shared.client.calls import Answer, NotServed
from shared.client.swarm_client import SwarmClient
from shared.errors import Busy, ConnectionLost, NoRoute, SessionFailed
from shared.identity import PeerId, short
from shared.protocol import Backward, Close, Forward, Lend, RouteSpan
from shared.spans import Span

log = logging.getLogger(__name__)

AVOID_S = 10.0
"""How long a peer that failed us is passed over."""
PATIENCE_S = 60.0
"""How long to wait for layers that nobody serves at the moment."""
LOOK_AGAIN_S = 0.25
ATTEMPTS = 3
"""At one peer, while it is busy or wants an adapter again."""
MAX_LENT = 256
"""Loans that we remember to have made."""

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Leg:
    """One span's part of a pass, with what went in."""

    entry: RouteSpan
    inputs: torch.Tensor


@dataclass
class Passed:
    """A pass that is over: what came out, and the legs to go back by."""

    behind: list[torch.Tensor]
    """The hidden states behind each layer, or only those behind the last."""
    legs: list[Leg]


class Chain:
    """The layers of one artefact, wherever they are. All of it runs in the client's event loop."""

    def __init__(self, client: SwarmClient, artefact: str, wire: torch.dtype) -> None:
        self.wire = wire
        """The format in which hidden states travel."""
        self.visits: Counter[str] = Counter()
        """Passes that each peer computed."""
        self.rerouted = 0
        """Times that a peer failed and another took its place."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self._client = client
        self._artefact = artefact
        self._avoided: dict[PeerId, float] = {}
        self._running: Counter[str] = Counter()
        self._lent: dict[tuple[PeerId, str], asyncio.Task[None]] = {}

    # ------------------------------------------------------------ passes

    async def forward(
        self, states: torch.Tensor, start: int, end: int, carried: Carried, *, each: bool = False
    ) -> Passed:
        """Through layers [start, end)."""
        passed = Passed([], [])
        reached = start
        while reached < end:
            route = await self.route(reached, end, carried.hosted)
            # Counted before the first of them is asked: the next micro-batch shall choose others.
            self._running.update(entry.peer for entry in route)
            try:
                for entry in route:
                    found = await self._ask_forward(entry, states, carried, each=each)
                    passed.legs.append(Leg(entry, states))
                    passed.behind += found if each else []
                    states, reached = found[-1], entry.end
            except (ConnectionLost, NotServed) as error:
                await self.failed(entry, error)
            finally:
                self._running.subtract(entry.peer for entry in route)
        passed.behind = passed.behind if each else [states]
        return passed

    async def backward(
        self, legs: Sequence[Leg], gradient: torch.Tensor, carried: Carried, *, learns: bool
    ) -> tuple[torch.Tensor, Gradients]:
        """Back through the legs of a pass: the gradient of what went in, and those of what was carried."""
        left, sums = list(legs), Gradients()
        while left:
            leg = left.pop()
            try:
                found = await self._ask_backward(leg, gradient, carried, learns=learns)
            except (ConnectionLost, NotServed) as error:
                await self.failed(leg.entry, error)
                again = await self.forward(leg.inputs, leg.entry.start, leg.entry.end, carried)
                left += again.legs
                continue
            gradient = found.pop("hidden")
            for name, tensor in found.items():
                sums[name] = sums[name] + tensor if name in sums else tensor
        return gradient, sums

    async def _ask_forward(
        self, entry: RouteSpan, states: torch.Tensor, carried: Carried, *, each: bool
    ) -> list[torch.Tensor]:
        tensors = {"hidden": states.to(self.wire), **carried.tensors(entry.start, entry.end)}
        found = await self.ask(entry, Forward, tensors, carried, each=each)
        return outputs(entry, found, states, each=each)

    async def _ask_backward(
        self, leg: Leg, gradient: torch.Tensor, carried: Carried, *, learns: bool
    ) -> Gradients:
        entry = leg.entry
        tensors = {
            "hidden": leg.inputs.to(self.wire),
            "gradient": gradient.to(self.wire),
            **carried.tensors(entry.start, entry.end),
        }
        found = await self.ask(entry, Backward, tensors, carried, learns=learns)
        if "hidden" not in found or found["hidden"].shape != leg.inputs.shape:
            raise ConnectionLost(
                f"{short(PeerId(entry.peer))} answered with other tensors than were asked for"
            )
        return found

    async def ask(
        self,
        entry: RouteSpan,
        kind: type[Forward] | type[Backward],
        tensors: dict[str, torch.Tensor],
        carried: Carried,
        priority: Priority = Priority.PREFILL,
        **fields: object,
    ) -> dict[str, torch.Tensor]:
        """One request to one peer. Raises NotServed or ConnectionLost."""
        peer = PeerId(entry.peer)
        parts, body = await asyncio.to_thread(pack, tensors)
        loan = carried.loan(entry.start, entry.end)
        message = kind(
            request=0,
            artefact=self._artefact,
            start=entry.start,
            end=entry.end,
            parts=parts,
            adapter=loan.adapter if loan else carried.hosted,
            **fields,  # type: ignore[arg-type]  # each kind has its own
        )
        answer, answered = await self._patiently(peer, message, body, loan, priority)
        self.visits[entry.peer] += 1
        self.bytes_sent += len(body)
        self.bytes_received += len(answered)
        return await asyncio.to_thread(unpack, answer.parts, answered)

    async def _patiently(
        self,
        peer: PeerId,
        message: Forward | Backward,
        body: bytes,
        loan: Loan | None,
        priority: Priority,
    ) -> Answer:
        """The answer of a peer that may have to be lent an adapter again, or may be busy for a moment."""
        left = ATTEMPTS
        while True:
            left -= 1
            try:
                if loan is not None:
                    await self._lend(peer, loan)
                return await self._client.calls.ask(peer, message, body, priority)
            except NotServed as error:
                code = error.refusal.code
                if not left or (code != "busy" and (code != "adapter" or loan is None)):
                    raise
                if loan is not None:
                    self._lent.pop((peer, loan.adapter), None)
                await asyncio.sleep(error.refusal.retry_after_s)

    async def _lend(self, peer: PeerId, loan: Loan) -> None:
        """Lend an adapter, once to each peer; whoever comes meanwhile waits for the same loan."""
        key = peer, loan.adapter
        task = self._lent.get(key)
        if task is None or (task.done() and task.exception() is not None):
            while len(self._lent) >= MAX_LENT:
                del self._lent[next(iter(self._lent))]
            task = self._lent[key] = asyncio.ensure_future(self._lend_now(peer, loan))
        await asyncio.shield(task)

    async def _lend_now(self, peer: PeerId, loan: Loan) -> None:
        await self._client.calls.ask(peer, Lend(0, loan.adapter, loan.parts), loan.body)
        self.bytes_sent += len(loan.body)

    # ------------------------------------------------------------ routes

    async def route(self, start: int, end: int, adapter: str) -> list[RouteSpan]:
        """Who computes these layers now. Waits for layers that are away; raises NoRoute when they stay so."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.plan(start, end, adapter)
            except (NoRoute, Busy):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(LOOK_AGAIN_S)

    def plan(self, start: int, end: int, adapter: str = "", *, tokens: int = 0) -> list[RouteSpan]:
        """A route for a pass that begins now. Raises NoRoute or Busy."""
        now = time.monotonic()
        self._avoided = {peer: until for peer, until in self._avoided.items() if until > now}
        return self._client.plan_pass(
            self._artefact,
            Span(start, end),
            avoid=frozenset(self._avoided),
            running=self._running,
            adapter=adapter,
            tokens=tokens,
        )

    def plan_or_none(self, start: int, end: int, adapter: str = "") -> list[RouteSpan]:
        """As `plan`, but an empty route when there is none now."""
        try:
            return self.plan(start, end, adapter)
        except (NoRoute, Busy):
            return []

    async def failed(self, entry: RouteSpan, error: ConnectionLost | NotServed) -> None:
        """A peer did not do its part: others are asked for a while. Raises what would fail everywhere."""
        if isinstance(error, NotServed) and error.refusal.code == "invalid":
            raise SessionFailed(f"layers {entry.start}–{entry.end}: {error}") from error
        log.info("%s is passed over for a while: %s", short(PeerId(entry.peer)), error)
        self.rerouted += 1
        if not (isinstance(error, NotServed) and error.refusal.code == "lost"):
            self._avoided[PeerId(entry.peer)] = time.monotonic() + AVOID_S

    async def close(self, entry: RouteSpan, session: str) -> None:
        """Tell a peer that a session is over, if it is there."""
        try:
            async with asyncio.timeout(2.0):
                await self._client.calls.tell(PeerId(entry.peer), Close(session))
        except (ConnectionLost, TimeoutError):
            log.debug("a session was not closed: its lease ends it")


def outputs(
    entry: RouteSpan, found: dict[str, torch.Tensor], states: torch.Tensor, *, each: bool
) -> list[torch.Tensor]:
    """What a peer answered, if it has the form that was asked for. Raises ConnectionLost."""
    names = [f"hidden.{layer}" for layer in range(entry.start, entry.end)] if each else ["hidden"]
    if any(name not in found or found[name].shape != states.shape for name in names):
        raise ConnectionLost(f"{short(PeerId(entry.peer))} answered with other tensors than were asked for")
    return [found[name] for name in names]


@dataclass
class _Held:
    """One span of a session: who holds it, under which name, and all that went in."""

    entry: RouteSpan
    session: str
    log: torch.Tensor


class ChainSession:
    """Keys and values of one batch along layers [start, end), kept by peers. `position` may be set back."""

    def __init__(self, chain: Chain, start: int, end: int, room: int) -> None:
        self._chain = chain
        self._start, self._end = start, end
        self._room = room
        self._held: list[_Held] = []
        self._positions: torch.Tensor | None = None

    async def step(
        self,
        states: torch.Tensor,
        position: int,
        carried: Carried,
        order: torch.Tensor | None = None,
        *,
        each: bool = False,
    ) -> list[torch.Tensor]:
        """Append hidden states [batch, count, width] at `position`; the batch is put in `order` first."""
        if not self._held:
            order = None
            route = await self._chain.route(self._start, self._end, carried.hosted)
            self._held = [_Held(entry, secrets.token_hex(16), states[:, :0]) for entry in route]
        for held in self._held:
            held.log = (held.log if order is None else held.log[order])[:, :position]
        whole = replace(carried, positions=self._all_positions(carried, states, position, order))
        behind: list[torch.Tensor] = []
        index = 0
        while index < len(self._held):
            held = self._held[index]
            held.log = torch.cat([held.log, states], 1)
            try:
                found = await self._ask(held, states, position, carried, order, each=each)
                moved = [held]
            except (ConnectionLost, NotServed) as error:
                await self._chain.failed(held.entry, error)
                moved, found = await self._replay(held, whole, states.shape[1], each=each)
                self._held[index : index + 1] = moved
            behind += found if each else []
            states = found[-1]
            index += len(moved)
        return behind if each else [states]

    async def close(self) -> None:
        """Free it everywhere. A further step begins anew from what it is given."""
        held, self._held = self._held, []
        await asyncio.gather(*(self._chain.close(one.entry, one.session) for one in held))

    async def _ask(
        self,
        held: _Held,
        states: torch.Tensor,
        position: int,
        carried: Carried,
        order: torch.Tensor | None,
        *,
        each: bool,
    ) -> list[torch.Tensor]:
        entry = held.entry
        tensors = {"hidden": states.to(self._chain.wire), **carried.tensors(entry.start, entry.end)}
        if order is not None and position:
            tensors["order"] = order.to(torch.int32)
        found = await self._chain.ask(
            entry,
            Forward,
            tensors,
            carried,
            Priority.DECODE if states.shape[1] == 1 else Priority.PREFILL,
            each=each,
            session=held.session,
            position=position,
            room=self._room,
        )
        return outputs(entry, found, states, each=each)

    async def _replay(
        self, lost: _Held, carried: Carried, count: int, *, each: bool
    ) -> tuple[list[_Held], list[torch.Tensor]]:
        """Other peers for a lost span, with all that it had; and what the last `count` positions give."""
        while True:
            states, moved, behind = lost.log, [], []
            for entry in await self._chain.route(lost.entry.start, lost.entry.end, carried.hosted):
                held = _Held(entry, secrets.token_hex(16), states)
                try:
                    found = await self._ask(held, states, 0, carried, None, each=each)
                except (ConnectionLost, NotServed) as error:
                    await self._chain.failed(entry, error)
                    break
                moved.append(held)
                behind += [one[:, -count:] for one in found]
                states = found[-1]
            else:
                return moved, behind if each else [states[:, -count:]]

    def _all_positions(
        self, carried: Carried, states: torch.Tensor, position: int, order: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The positions of the whole batch so far, if they ever were unusual."""
        batch, count = states.shape[:2]
        usual = torch.arange(position, position + count).expand(batch, -1)
        now = usual if carried.positions is None else carried.positions
        before = self._positions
        if before is None:
            before = torch.arange(position).expand(batch, -1)
        elif order is not None:
            before = before[order]
        self._positions = torch.cat([before[:, :position], now.to(before.dtype)], 1)
        if torch.equal(self._positions, torch.arange(position + count).expand(batch, -1)):
            return None
        return self._positions
