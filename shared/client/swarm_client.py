"""A participant that asks: one identity, its relays, its map of the swarm, and its running sessions."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import msgspec

from shared.background import Background
from shared.channel import Channel, Dialer, Listen, PathReport, Priority
from shared.client.calls import Calls
from shared.client.directory import Directory
from shared.client.generation import Generation
from shared.client.page_names import PageNames
from shared.client.prefix_routes import PrefixRoutes, worth_it
from shared.client.probes import PROBE_S, Probes
from shared.client.route_planner import Candidate, fill_route, plan_route, route_ms
from shared.client.session import Drawn, Planner, Request, Rerouted, Spare
from shared.client.standbys import choose_standby
from shared.client.two_choices import Choice, explain, informed, replays_by_peer, two_choices
from shared.errors import Busy, ChannelClosed, ConnectionLost, CorollaError, NoRoute, ProtocolError
from shared.identity import Identity, PeerId
from shared.protocol import (
    Announcement,
    Consumed,
    Decline,
    Failed,
    Fetch,
    Files,
    Load,
    Lost,
    Opened,
    Outputs,
    Path,
    PeerMessage,
    Refusal,
    RouteSpan,
    Scored,
    Step,
    Token,
)
from shared.relay_client import RelayClient
from shared.relays import Relays
from shared.spans import Span
from shared.tokenizer_files import files_hash, split_files

log = logging.getLogger(__name__)

BUSY_STANDBY_MS = 60.0
"""What a token may take at a standby: it lags behind by sixteen, and makes up for them in a second."""
FETCH_TIMEOUT_S = 15.0
FULL_PROBE_S = 1.0
"""How long peers may take to say whether they are still full: there is nothing else to do meanwhile."""
PASS_MS = 50.0
"""What a pass of a training waits behind another one, about: enough that passes spread over equal peers."""
GOODBYE_S = 1.0
"""How long leaving waits for the last messages of sessions that were cut off."""


class SwarmClient:
    """Ask a swarm for tokens.

    async with SwarmClient(identity, "http://relay:8787") as swarm:
        async for event in swarm.generate(request): ...

    With several relays it sees what any of them shows, and reaches a peer by any that both are at.
    """

    def __init__(
        self,
        identity: Identity,
        relays: str | Sequence[str],
        *,
        direct: bool = True,
        listen: Listen | None = None,
    ) -> None:
        self.identity = identity
        self.standbys = True
        """Whether sessions that begin from now on look for peers that follow their hops."""
        self.directory = Directory()
        self.relays = Relays(relays, identity)
        self._dialer = Dialer(
            identity,
            self.relays.clients,
            self._handle,
            on_closed=self._channel_closed,
            direct=direct,
            listen=listen,
        )
        self.calls = Calls(self._dialer.channel)
        """Forward and backward passes, each by one peer."""
        self._probes = Probes(self._dialer.channel)
        self._pages = PageNames(secrets.token_bytes(32))
        self._routes = PrefixRoutes()
        self._generations: dict[str, Generation] = {}
        self._fetches: dict[int, _Fetch] = {}
        self._requests = itertools.count(1)
        self._stack = AsyncExitStack()
        self._tasks = Background(grace_s=GOODBYE_S)

    async def __aenter__(self) -> Self:
        self._stack.callback(self.directory.listen(self._look_who_leaves))
        for relay in self.relays.clients:
            self._listen(relay)
        await self._stack.enter_async_context(self.relays)
        await self._stack.enter_async_context(self._dialer)
        await self._stack.enter_async_context(self._tasks)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    # ------------------------------------------------------------ asking

    async def generate(
        self, request: Request, reserved: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Drawn | Rerouted, None]:
        """The tokens of an answer as they are drawn, and every change of route.

        `reserved` is called when every hop of a route has room for the whole session. Raises NoRoute, NoRoom,
        Busy or SessionFailed; what was yielded before stays valid.
        """
        plan = await self._planner(request)
        generation = Generation(
            self._dialer,
            request,
            plan,
            self._pages.names,
            self._tasks,
            self._spare(request),
            self.directory.is_live,
            reserved,
        )
        self._generations[generation.session] = generation
        failed = drawn = False
        try:
            async for event in generation.events():
                if isinstance(event, Drawn) and not drawn:
                    # From now on each hop holds the prompt, and lends it.
                    drawn = True
                    self._routes.remember(self._pages.names(request.prompt), generation.route)
                yield event
        except CorollaError:
            failed = True
            raise
        finally:
            del self._generations[generation.session]
            if not failed:
                self._routes.remember(self._pages.names(generation.tokens), generation.route)

    async def _planner(self, request: Request) -> Planner:
        """Plans routes for a session; the first of two that were compared by what their peers say now."""
        salt = str(next(self._requests))
        tokens = len(request.prompt) + request.max_new_tokens
        choice = await self._compare(request, tokens, salt)

        def plan(
            survivors: Sequence[RouteSpan],
            avoid: frozenset[PeerId],
            held: Mapping[PeerId, int],
            replay: int,
        ) -> list[RouteSpan]:
            first, candidates = self._candidates(request.artefact, avoid, request.adapter)
            layers, model = first.layer_count, first.model
            if not survivors and not avoid:
                compared = [candidate for candidate in candidates if candidate.peer in choice.peers]
                with contextlib.suppress(NoRoute, Busy):
                    best = fill_route([], compared, layers, model=model, tokens=tokens, salt=salt)
                    return self._where_it_began(request, best, candidates, tokens, salt)
            try:
                return fill_route(
                    survivors,
                    candidates,
                    layers,
                    model=model,
                    tokens=tokens,
                    salt=salt,
                    replay=replay,
                    held=held,
                )
            except Busy:
                raise explain(candidates, self._probes.loads(), layers, model, tokens) from None

        return plan

    def _where_it_began(
        self,
        request: Request,
        best: list[RouteSpan],
        candidates: Sequence[Candidate],
        tokens: int,
        salt: str,
    ) -> list[RouteSpan]:
        """The route whose hops hold the beginning of this text, if that is the faster one; else the best."""
        again, positions = self._routes.find(self._pages.names(request.prompt))
        if not again:
            return best
        again_ms, best_ms = (route_ms(route, candidates, tokens=tokens, salt=salt) for route in (again, best))
        if again_ms is None or best_ms is None:
            return best
        return list(again) if worth_it(again_ms, best_ms, positions, request.max_new_tokens) else best

    def _spare(self, request: Request) -> Spare:
        """Finds standbys for a session."""
        tokens = len(request.prompt) + request.max_new_tokens

        if not self.standbys:
            return lambda entry, avoid: None

        def spare(entry: RouteSpan, avoid: frozenset[PeerId]) -> PeerId | None:
            try:
                _, candidates = self._candidates(request.artefact, avoid, request.adapter)
            except NoRoute:
                return None
            return choose_standby(entry, candidates, tokens=tokens, busiest=BUSY_STANDBY_MS)

        return spare

    async def _compare(self, request: Request, tokens: int, salt: str) -> Choice:
        """The two best routes, by what is known once their peers have been asked, where that may matter."""
        first, candidates = self._candidates(request.artefact, adapter=request.adapter)
        choice = two_choices(candidates, first.layer_count, model=first.model, tokens=tokens, salt=salt)
        await self._probes.ask(choice.ask, tokens, FULL_PROBE_S if choice.full else PROBE_S)
        return choice

    def _candidates(
        self, artefact: str, avoid: frozenset[PeerId] = frozenset(), adapter: str = ""
    ) -> tuple[Announcement, list[Candidate]]:
        """Any peer that serves the artefact, and all but those to avoid as the planner sees them."""
        serving = self.directory.serving(artefact)
        if not serving:
            raise NoRoute("no live peer serves any layer of this model")
        ours = Counter(
            span.peer
            for generation in self._generations.values()
            for span in (*generation.route, *generation.standbys)
        )
        loads = self._probes.loads()
        replays = replays_by_peer(generation.replaying for generation in self._generations.values())
        candidates = [
            informed(
                self._candidate(peer),
                loads.get(PeerId(peer.peer)),
                ours[peer.peer],
                replays.get(PeerId(peer.peer), ()),
            )
            for peer in serving
            if peer.peer not in avoid and (not adapter or adapter in {one.id for one in peer.adapters})
        ]
        return serving[0], candidates

    def plan_pass(
        self,
        artefact: str,
        wanted: Span,
        *,
        avoid: frozenset[PeerId],
        running: Mapping[str, int],
        adapter: str = "",
        tokens: int = 0,
    ) -> list[RouteSpan]:
        """Who computes these layers in a pass that begins now; `running` are those of ours under way.

        Raises NoRoute or Busy.
        """
        first, candidates = self._candidates(artefact, avoid, adapter)
        laden = [
            msgspec.structs.replace(one, wait_ms=one.wait_ms + PASS_MS * running.get(one.peer, 0))
            for one in candidates
        ]
        salt = str(next(self._requests))
        return plan_route(laden, wanted, model=first.model, tokens=tokens, salt=salt)

    def _candidate(self, announcement: Announcement) -> Candidate:
        peer = PeerId(announcement.peer)
        channel = self._dialer.channels.get(peer)
        return Candidate(
            peer=peer,
            span=Span(announcement.start, announcement.end),
            kv_tokens_free=announcement.kv_tokens_free,
            ms_per_layer=announcement.ms_per_layer,
            rtt_ms=channel.rtt_ms if channel else None,
            sessions=announcement.sessions,
            wait_ms=announcement.wait_ms,
        )

    async def fetch_files(self, artefact: str) -> Mapping[str, bytes]:
        """The tokenizer files of a model, from any live peer that serves it, checked against their hash.

        Raises NoRoute when nobody serves the artefact, ConnectionLost when no peer handed them out.
        """
        peers = [peer for peer in self.directory.live() if peer.artefact == artefact]
        # One that is joining hangs up on everyone, so it is asked last, in case it serves by then.
        peers.sort(key=lambda peer: peer.state == "joining")
        if not peers:
            raise NoRoute("no live peer serves any layer of this model")
        for announcement in peers:
            try:
                files = await self._fetch_from(PeerId(announcement.peer), artefact)
            except (ConnectionLost, ProtocolError, TimeoutError) as error:
                log.info("%s did not hand out its tokenizer: %s", announcement.name, error)
                continue
            if files_hash(files) == announcement.tokenizer:
                return files
            log.warning("%s handed out a tokenizer that is not the one it announced", announcement.name)
        raise ConnectionLost(f"no peer of {peers[0].model} handed out its tokenizer")

    async def _fetch_from(self, peer: PeerId, artefact: str) -> dict[str, bytes]:
        request = next(self._requests)
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            channel = await self._dialer.channel(peer)
            fetch = self._fetches[request] = _Fetch(channel)
            try:
                await channel.send(Fetch(request, artefact), b"", Priority.CONTROL)
                files, body = await fetch.answer
            finally:
                del self._fetches[request]
        return split_files(files, body)

    # ------------------------------------------------------------ listening

    def _listen(self, relay: RelayClient) -> None:
        relay.watch(lambda record: self.directory.add(record, relay.url))
        relay.on_gone(lambda peer: self.directory.gone(peer, relay.url))
        relay.on_state(lambda connected: None if connected else self.directory.lost(relay.url))

    def _look_who_leaves(self) -> None:
        """Peers that say so in their announcement keep their sessions until those are handed over."""
        for generation in self._generations.values():
            for span in (*generation.route, *generation.standbys):
                announcement = self.directory.get(PeerId(span.peer))
                if announcement is not None and announcement.state == "draining":
                    generation.leaving(PeerId(span.peer))

    def links(self) -> dict[PeerId, tuple[Path, float | None]]:
        """Open channels: what carries each now, and its round trip in ms when measured."""
        return {peer: (channel.path, channel.rtt_ms) for peer, channel in self._dialer.channels.items()}

    def path_reports(self) -> dict[PeerId, PathReport]:
        """Open channels: what carries each now, and why nothing better does."""
        return {peer: channel.report() for peer, channel in self._dialer.channels.items()}

    def _handle(
        self, channel: Channel, message: PeerMessage, body: memoryview, path: Path
    ) -> Awaitable[None] | None:
        match message:
            case Opened() | Decline() | Consumed() | Scored() | Token() | Failed() | Lost():
                if generation := self._generations.get(message.session):
                    return generation.received(channel, message)
            case Load():
                self._probes.heard(channel.peer, message)
            case Files(request=request):
                fetch = self._fetches.get(request)
                if fetch is not None and fetch.channel is channel and not fetch.answer.done():
                    fetch.answer.set_result((message, bytes(body)))
            case Outputs() | Refusal():
                self.calls.heard(channel, message, body)
            case Step():
                pass  # an asker named us as a hop: the peer that fell for it serves our sessions as well
            case _:
                raise ProtocolError(f"a {type(message).__name__} is for peers, and I serve no layers")
        return None

    def _channel_closed(self, channel: Channel) -> None:
        self.calls.channel_closed(channel)
        for generation in list(self._generations.values()):
            generation.channel_closed(channel)
        for fetch in self._fetches.values():
            if fetch.channel is channel and not fetch.answer.done():
                fetch.answer.set_exception(ChannelClosed(channel.reason))


class _Fetch:
    """A question for tokenizer files that waits for its answer on one channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.answer: asyncio.Future[tuple[Files, bytes]] = asyncio.get_running_loop().create_future()
        # Whoever asked may have failed before, for the same reason.
        self.answer.add_done_callback(lambda done: done.cancelled() or done.exception())
