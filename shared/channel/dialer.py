"""Gives a channel to any participant by its id, and accepts those of others.

An offer and an answer, signed and passed on by a relay, agree on the channel's keys. The caller's channel is
open when the answer comes; the other side's when the caller's first sealed word proves that it holds the key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

from shared.background import Background
from shared.channel.addresses import Interface, Listen, local_interfaces, neighbours
from shared.channel.channel import Channel, Handler, MakeDirect, Openings
from shared.channel.listening import ListeningPort
from shared.channel.relayed import Meeting, Relay, RelayedLink
from shared.channel.sealed import (
    Ephemeral,
    Keys,
    SeenChannels,
    agree,
    channel_tag,
    make_answer,
    make_offer,
    read_greeting,
    sealed_tag,
    text_hash,
)
from shared.channel.webrtc import DirectLink, new_certificate
from shared.errors import ConnectionLost, ProtocolError
from shared.identity import Identity, PeerId, short
from shared.protocol import Greeting, NatKind, Signal, SignedRecord

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 5.0
# Offers beyond these are not answered: the caller tries again, or elsewhere.
MAX_CHANNELS = 1024
MAX_UNPROVEN = 64
# Direct links being opened at once, each with a socket per address of this machine; others wait on the relay.
MAX_OPENING = 16
# Home networks change when a cable is pulled or a laptop wakes up; looking takes half a millisecond.
LOOK_AT_ADDRESSES_S = 5.0


class _Dial:
    """Those who wait for a channel to one peer, and our offer to it unless the peer's own goes first."""

    def __init__(self, offer: Ephemeral | None) -> None:
        self.offer = offer
        self.done: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        # Every caller may have given up before the outcome is known.
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.absent: set[Meeting] = set()
        self.timer: asyncio.TimerHandle | None = None


class Dialer:
    """All channels of one participant, over one or several relay connections.

    `handler` gets the messages of all channels; `on_closed` is told once for each that was open. With
    `listen` the other ends of channels may call a port of ours; entering raises SettingsError when it cannot
    be had. The relay connections must outlive it.
    """

    def __init__(
        self,
        identity: Identity,
        relays: Relay | Sequence[Relay],
        handler: Handler,
        *,
        direct: bool = True,
        listen: Listen | None = None,
        on_closed: Callable[[Channel], None] | None = None,
    ) -> None:
        self.identity = identity
        self.channels: dict[PeerId, Channel] = {}
        """The open channels."""
        self.refused_signals = 0
        """Greetings that were forged, stale, repeated or not for us."""
        self._handler = handler
        self._on_closed = on_closed
        self._certificate = new_certificate() if direct else None
        self._meetings = [
            Meeting(relay) for relay in ([*relays] if isinstance(relays, Sequence) else [relays])
        ]
        self._seen = SeenChannels()
        self._dials: dict[PeerId, _Dial] = {}
        self._unproven: dict[PeerId, Channel] = {}
        self._by_tag: dict[bytes, Channel] = {}
        self._direct_limit = asyncio.Semaphore(MAX_OPENING)
        self._socket_limit = asyncio.Semaphore(MAX_OPENING)
        self.port = ListeningPort(listen) if listen is not None and direct else None
        """Where the other ends of channels may call."""
        self._interfaces: frozenset[Interface] = frozenset()
        self._stack = AsyncExitStack()
        self._tasks = Background()
        self._open = False

    async def __aenter__(self) -> Self:
        if self.port is not None:
            await self._stack.enter_async_context(self.port)
        self._open = True
        if self._certificate is not None:
            self._interfaces = local_interfaces()
            self._tasks.start(self._watch_addresses())
        for meeting in self._meetings:
            self._listen(meeting)
            self._tasks.start(meeting.run())
            if meeting.connected:
                self._look_at_router(meeting)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        try:
            await asyncio.gather(*(channel.close("the other side stops") for channel in self._all()))
        finally:
            for peer in tuple(self._dials):
                self._fail(peer, "cannot be dialled any more: this side stops")
            await self._tasks.__aexit__(kind, error, trace)
            await self._stack.aclose()

    @property
    def nat(self) -> NatKind:
        """What our own router does to packets, as far as our relays have shown."""
        return next((meeting.nat for meeting in self._meetings if meeting.nat != "unknown"), "unknown")

    async def channel(self, peer: PeerId, timeout: float = DIAL_TIMEOUT_S) -> Channel:
        """The channel to `peer`, dialled if there is none. Raises ConnectionLost when it does not answer."""
        if peer in self.channels:
            return self.channels[peer]
        if peer == self.identity.id:
            raise ConnectionLost("a participant has no channel to itself")
        if not self._open:
            raise ConnectionLost("this side's channels are closed")
        dial = self._dials.get(peer) or self._dial(peer)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(dial.done)
        except TimeoutError:
            raise ConnectionLost(f"{short(peer)} did not answer in {timeout:.0f} s") from None

    # ------------------------------------------------------------ dialling

    def _dial(self, peer: PeerId) -> _Dial:
        # One that the peer opened and has not proven yet will do.
        offer = (
            None
            if peer in self._unproven
            else make_offer(self.identity, peer, time.time(), self._whereabouts)
        )
        dial = self._dials[peer] = _Dial(offer)
        dial.timer = asyncio.get_running_loop().call_later(
            DIAL_TIMEOUT_S, self._fail, peer, f"did not answer in {DIAL_TIMEOUT_S:.0f} s"
        )
        if offer is not None:
            for meeting in self._meetings:
                self._tasks.start(self._signal(meeting, peer, offer.record))
        return dial

    def _fail(self, peer: PeerId, why: str) -> None:
        dial = self._dials.pop(peer)
        if dial.timer is not None:
            dial.timer.cancel()
        if not dial.done.done():
            dial.done.set_exception(ConnectionLost(f"no channel to {short(peer)}: it {why}"))

    async def _signal(self, meeting: Meeting, receiver: PeerId, record: SignedRecord) -> None:
        try:
            await meeting.relay.send_signal(Signal(receiver, record))
        except ConnectionLost as error:
            log.info("a greeting to %s did not leave: %s", short(receiver), error)

    # ------------------------------------------------------------ greetings that come

    def _on_signal(self, meeting: Meeting, signal: Signal) -> None:
        if not self._open:
            return
        now = time.time()
        try:
            greeting = read_greeting(signal.record, self.identity.id, now)
            if greeting.kind == "offer":
                self._seen.check(greeting, now)
                self._offered(meeting, greeting, signal.record)
            else:
                self._answered(meeting, greeting, signal.record)
        except ProtocolError as error:
            self.refused_signals += 1
            log.info("a greeting is refused: %s", error)

    def _offered(self, meeting: Meeting, offer: Greeting, record: SignedRecord) -> None:
        peer = PeerId(offer.sender)
        dial = self._dials.get(peer)
        if dial is not None and dial.offer is not None:
            if self.identity.id < peer:
                return  # Both dialled at once: the offer of the lower id stands, and this is not it.
            dial.offer = None
        if len(self._by_tag) >= MAX_CHANNELS or len(self._unproven) >= MAX_UNPROVEN:
            log.warning("an offer of %s is not answered: too many channels", short(peer))
            return
        own = make_answer(self.identity, offer, record, time.time(), self._whereabouts)
        keys = agree(own, record, own.record, offer.key)
        if peer in self._unproven:
            self._unproven[peer].end("it dialled again", bye=False)
        channel = self._make(meeting, keys, offer, dialled=False)
        self._unproven[peer] = channel
        asyncio.get_running_loop().call_later(DIAL_TIMEOUT_S, self._expire, channel)
        self._tasks.start(self._signal(meeting, peer, own.record))

    def _answered(self, meeting: Meeting, answer: Greeting, record: SignedRecord) -> None:
        peer = PeerId(answer.sender)
        dial = self._dials.get(peer)
        offer = dial.offer if dial is not None else None
        if offer is None or (answer.channel, answer.answers) != (
            offer.greeting.channel,
            text_hash(offer.record.body),
        ):
            raise ProtocolError(f"{short(peer)} answers an offer that is not open")
        keys = agree(offer, offer.record, record, answer.key)
        channel = self._make(meeting, keys, answer, dialled=True)
        self._establish(channel)
        channel.greet()

    # ------------------------------------------------------------ channels

    def _make(self, meeting: Meeting, keys: Keys, theirs: Greeting, *, dialled: bool) -> Channel:
        peer, tag = PeerId(theirs.sender), channel_tag(theirs.channel)
        if tag in self._by_tag:
            raise ProtocolError("a channel of that name is open")
        channel = self._by_tag[tag] = Channel(
            peer,
            RelayedLink(peer, self._meetings, meeting, keys),
            self._handler,
            dialled=dialled,
            openings=self._openings(theirs),
            on_closed=lambda channel: self._closed(tag, channel),
        )
        return channel

    @property
    def _whereabouts(self) -> str:
        """Where a relay sees us, for those who may become direct."""
        seen = (meeting.relay.address for meeting in self._meetings if meeting.connected)
        return next(seen, "") if self._certificate is not None else ""

    def _openings(self, theirs: Greeting) -> Openings:
        certificate = self._certificate
        make_direct: MakeDirect | None = None
        interfaces: Callable[[], frozenset[Interface]] | None = None
        if certificate is not None:
            controlling = self.identity.id < theirs.sender
            make_direct = partial(DirectLink, certificate, controlling)
            interfaces = self._own_interfaces
        return Openings(
            make_direct,
            self._direct_limit,
            self.port,
            interfaces,
            self._socket_limit,
            neighbours(self._whereabouts, theirs.seen),
        )

    def _own_interfaces(self) -> frozenset[Interface]:
        return self._interfaces

    async def _watch_addresses(self) -> None:
        """Tell the channels when this machine is in another network than before."""
        while True:
            await asyncio.sleep(LOOK_AT_ADDRESSES_S)
            found = local_interfaces()
            if found != self._interfaces:
                log.info("the addresses of this machine changed")
                self._interfaces = found
                for channel in self.channels.values():
                    channel.look_again()

    def _establish(self, channel: Channel) -> None:
        """From now on this is the channel to its peer."""
        previous = self.channels.get(channel.peer)
        self.channels[channel.peer] = channel
        self._tasks.start(channel.run()).add_done_callback(lambda _: channel.stopped())
        if previous is not None:
            previous.end("a newer channel takes its place", bye=False)
        dial = self._dials.pop(channel.peer, None)
        if dial is not None:
            if dial.timer is not None:
                dial.timer.cancel()
            if not dial.done.done():
                dial.done.set_result(channel)

    def _expire(self, channel: Channel) -> None:
        if self._unproven.get(channel.peer) is channel:
            channel.end("the caller never spoke", bye=False)

    def _closed(self, tag: bytes, channel: Channel) -> None:
        del self._by_tag[tag]
        if self._unproven.get(channel.peer) is channel:
            del self._unproven[channel.peer]
            return
        if self.channels.get(channel.peer) is channel:
            del self.channels[channel.peer]
        if self._on_closed is not None:
            try:
                self._on_closed(channel)
            except Exception:
                # Whoever closes the channel is not to blame, and the other channels need it to go on.
                log.exception("who was told of a closed channel failed")

    # ------------------------------------------------------------ what relays tell

    def _listen(self, meeting: Meeting) -> None:
        relay = meeting.relay
        relay.on_signal(lambda signal: self._on_signal(meeting, signal))
        relay.on_frame(partial(self._frame, meeting))
        relay.on_gone(lambda peer: self._gone(meeting, peer))
        relay.on_dropped(self._dropped)
        relay.on_state(lambda connected: self._state(meeting, connected))

    def _frame(self, meeting: Meeting, peer: PeerId, sealed: memoryview) -> None:
        channel = self._by_tag.get(sealed_tag(sealed))
        if channel is None or channel.peer != peer:
            return  # A late frame of a channel that is closed.
        frame = channel.relayed.open(meeting, sealed)
        if frame is None:
            return
        if self._unproven.get(peer) is channel:
            del self._unproven[peer]
            self._establish(channel)
        channel.received(channel.relayed, frame)

    def _gone(self, meeting: Meeting, peer: PeerId) -> None:
        for channel in (self.channels.get(peer), self._unproven.get(peer)):
            if channel is not None:
                channel.relay_gone(meeting)
        dial = self._dials.get(peer)
        if dial is not None and dial.offer is not None:
            dial.absent.add(meeting)
            if all(each in dial.absent for each in self._meetings if each.connected):
                self._fail(peer, "is not connected to any relay of ours")

    def _dropped(self, peer: PeerId) -> None:
        if peer in self.channels:
            self.channels[peer].relay_dropped()

    def _state(self, meeting: Meeting, connected: bool) -> None:
        if connected:
            self._look_at_router(meeting)
        else:
            meeting.drop()
        for channel in self._all():
            (channel.relay_back if connected else channel.relay_cut)(meeting)
        if connected:
            for peer, dial in self._dials.items():
                dial.absent.discard(meeting)
                if dial.offer is not None:
                    self._tasks.start(self._signal(meeting, peer, dial.offer.record))

    def _look_at_router(self, meeting: Meeting) -> None:
        if self._certificate is not None:
            self._tasks.start(meeting.look_at_router())

    def _all(self) -> list[Channel]:
        return list(self._by_tag.values())
