"""One participant's WebSocket, from the challenge to the end: what it asks for, and what it is told.

A login is a signature over the relay's nonce and the host that the participant dialled (names.py says why).
Whatever one participant sends, only its own connection can suffer for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import assert_never

import aiohttp
from aiohttp import web

from relay.forwarding import forward
from relay.limits import FULL_RETRY_S, LimitReached, address_key, seen_address
from relay.meeting import Meeting
from relay.names import origin_is_welcome
from relay.participants import LAST_WORDS_S, NEVER_WAIT, Participant
from relay.registry import Entry, pages
from relay.signaling import pass_on
from shared.errors import ProtocolError, Refused
from shared.identity import short, verify
from shared.protocol import (
    MAX_RELAY_MESSAGE_BYTES,
    VERSION,
    Announce,
    Challenge,
    Denied,
    Found,
    FromRelay,
    Gone,
    Login,
    Lookup,
    Signal,
    ToRelay,
    Welcome,
    decode,
    encode,
    peer_id,
)
from shared.relay_client import LOGIN_DOMAIN, login_payload
from shared.short_way import ShortWay, shorten

log = logging.getLogger(__name__)

MEETING = web.AppKey("meeting", Meeting)

# Connections that have not logged in yet, on top of `max_participants`.
MAX_STRANGERS = 1000
# The wire's limit is checked here, with a sentence; only what is twice as long is cut off by aiohttp, mutely.
HARD_LIMIT_BYTES = 2 * MAX_RELAY_MESSAGE_BYTES
# The shortest frame costs the relay as much of its time as this many bytes of a long one.
FRAME_COST_BYTES = 1024


async def serve(request: web.Request) -> web.StreamResponse:
    """The `/ws` route."""
    meeting = request.app[MEETING]
    settings = meeting.settings
    if not origin_is_welcome(request.headers.get("Origin"), request.host, settings.origins):
        raise web.HTTPForbidden(text="pages of this origin may not use this relay; see --origin\n")
    full = len(meeting.participants) >= settings.max_participants
    if full or meeting.connections >= settings.max_participants + MAX_STRANGERS:
        raise web.HTTPServiceUnavailable(
            text="this relay is full: try another one, or later\n", headers=_retry_after(FULL_RETRY_S)
        )
    seen = seen_address(request.remote or "", request.headers.get("X-Forwarded-For"), settings.proxies)
    address = address_key(seen)
    try:
        meeting.limits.connect(address)
    except LimitReached as error:
        meeting.counts.refused_connections += 1
        raise web.HTTPTooManyRequests(text=f"{error}\n", headers=_retry_after(error.retry_after_s)) from None
    meeting.connections += 1
    try:
        return await _serve(request, meeting, seen, address)
    finally:
        meeting.connections -= 1
        meeting.limits.open.close(address)


async def _serve(request: web.Request, meeting: Meeting, seen: str, address: str) -> web.WebSocketResponse:
    settings = meeting.settings
    socket = web.WebSocketResponse(
        # Compression would cost 200 KiB of memory per participant, and sealed frames do not compress.
        compress=False,
        heartbeat=settings.heartbeat_s,
        max_msg_size=HARD_LIMIT_BYTES,
        timeout=LAST_WORDS_S,
        writer_limit=NEVER_WAIT,
    )
    writer = await socket.prepare(request)
    way = shorten(request.protocol, _not_yet, masked=True)
    try:
        login = await _log_in(socket, request, meeting)
        way.handled()
        if login is not None:
            assert request.transport is not None
            me = Participant(
                peer_id(login.peer), socket, request.transport, address, meeting.participants.backlog
            )
            await _Session(meeting, me, socket, writer, way).run(seen)
    except (ConnectionError, aiohttp.ClientError):
        log.debug("a connection ended in the middle of a word")
    finally:
        if not socket.closed:
            await socket.close()
    return socket


async def _log_in(socket: web.WebSocketResponse, request: web.Request, meeting: Meeting) -> Login | None:
    """Who this is, proven; None when it failed and was told so."""
    nonce = secrets.token_hex(32)
    await _say(socket, Challenge(nonce))
    try:
        async with asyncio.timeout(meeting.settings.login_deadline_s):
            received = await socket.receive()
        if received.type is not aiohttp.WSMsgType.TEXT:
            if socket.closed:
                return None
            raise Refused("log in first: a frame came before the login")
        login = decode(received.data, ToRelay)
        if not isinstance(login, Login):
            raise Refused(f"log in first: a {type(login).__name__} came before the login")
        if login.version != VERSION:
            raise Refused(f"this relay speaks version {VERSION} of the protocol, not {login.version}")
        verify(
            peer_id(login.peer),
            LOGIN_DOMAIN,
            login_payload(nonce, request.host),
            bytes.fromhex(login.signature),
        )
    except TimeoutError:
        await _refuse(socket, meeting, f"no login in {meeting.settings.login_deadline_s:.0f} s")
        return None
    except (ProtocolError, Refused) as error:
        await _refuse(socket, meeting, str(error))
        return None
    return login


async def _refuse(socket: web.WebSocketResponse, meeting: Meeting, reason: str) -> None:
    meeting.counts.refused_logins += 1
    await _say(socket, Denied(reason[:1000], fatal=True))
    await socket.close(code=aiohttp.WSCloseCode.POLICY_VIOLATION, message=_close_reason(reason))


async def _say(socket: web.WebSocketResponse, message: FromRelay) -> None:
    await socket.send_frame(encode(message), aiohttp.WSMsgType.TEXT)


class _Session:
    """A logged-in connection's reading side."""

    def __init__(
        self,
        meeting: Meeting,
        me: Participant,
        socket: web.WebSocketResponse,
        writer: aiohttp.abc.AbstractStreamWriter,
        way: ShortWay,
    ) -> None:
        self._meeting = meeting
        self._me = me
        self._socket = socket
        self._writer = writer
        self._way = way
        self._due_at = 0.0
        """When the bytes of its frames so far are paid for."""

    async def run(self, seen: str) -> None:
        async with self._present():
            self._me.send(Welcome(seen[:64], *self._meeting.stun_ports))
            self._way.take = self._carry_now
            async for received in self._socket:
                self._me.heard_at = time.monotonic()
                if received.type is aiohttp.WSMsgType.BINARY:
                    await self._carry(received.data)
                elif received.type is aiohttp.WSMsgType.TEXT:
                    await self._heard(received.data)
                self._way.handled()

    def _carry_now(self, frame: memoryview) -> bool:
        """Pass a frame on where it is read; False when earlier ones are not paid for yet."""
        now = time.monotonic()
        if now < self._due_at:
            return False
        self._me.heard_at = now
        forward(self._meeting.participants, self._me, frame, self._meeting.frames)
        cost = max(len(frame), FRAME_COST_BYTES)
        self._due_at = now + self._meeting.limits.take_bytes(self._me.peer, self._me.address, cost)
        return True

    async def _carry(self, frame: bytes) -> None:
        """The same, but wait until it may go: TCP lets the sender wait, and nothing is dropped."""
        while not self._carry_now(memoryview(frame)):
            await self._wait(self._due_at - time.monotonic())

    async def _charge(self, count: int) -> None:
        """Read on when the bytes of an answer are paid for."""
        await self._wait(self._meeting.limits.take_bytes(self._me.peer, self._me.address, count))

    @asynccontextmanager
    async def _present(self) -> AsyncIterator[None]:
        older = self._meeting.enter(self._me)
        self._meeting.counts.logins += 1
        log.debug("%s is here", short(self._me.peer))
        try:
            if older is not None:
                older.dismiss("you logged in again: the newer connection stays")
            yield
        finally:
            self._meeting.leave(self._me)
            log.debug("%s has gone", short(self._me.peer))

    async def _heard(self, text: str) -> None:
        """Do what a control message asks, or say why not."""
        if len(text) > MAX_RELAY_MESSAGE_BYTES:
            reason = f"a message may have {MAX_RELAY_MESSAGE_BYTES} bytes, this one has {len(text)}"
            self._me.send(Denied(reason, fatal=True))
            await self._socket.close(code=aiohttp.WSCloseCode.MESSAGE_TOO_BIG, message=_close_reason(reason))
            return
        await self._wait(self._meeting.limits.control.take(self._me.peer))
        try:
            await self._act(decode(text, ToRelay))
        except (ProtocolError, Refused) as error:
            self._meeting.counts.denied += 1
            retry_after_s = error.retry_after_s if isinstance(error, LimitReached) else 0.0
            self._me.send(Denied(str(error)[:1000], retry_after_s=retry_after_s))

    async def _act(self, message: ToRelay) -> None:
        match message:
            case Announce():
                self._meeting.announce(self._me, message.record)
            case Lookup():
                await self._look_up(message)
            case Signal():
                self._meeting.counts.signals += 1
                pass_on(self._meeting.participants, self._me, message)
            case Login():
                raise Refused("you are logged in already")
            case _:
                assert_never(message)

    async def _wait(self, wait_s: float) -> None:
        if wait_s > 0:
            self._meeting.counts.slowed_s += wait_s
            await asyncio.sleep(wait_s)

    async def _look_up(self, lookup: Lookup) -> None:
        meeting = self._meeting
        meeting.counts.lookups += 1
        if lookup.watch:
            if len(self._me.watches) >= meeting.settings.max_watches and lookup.model not in self._me.watches:
                raise Refused(
                    f"a connection may watch {meeting.settings.max_watches} models: watch all instead"
                )
            # Before the snapshot, so that no change falls between the two; records may come twice.
            meeting.participants.watch(self._me, lookup.model)
        found = meeting.registry.live(meeting.clock(), lookup.model)
        parts = list(pages(entry.record for entry in found))
        for number, page in enumerate(parts, start=1):
            message = encode(Found(lookup.request, page, more=number < len(parts)))
            self._me.send_encoded(message)
            # A large answer goes at the asker's own pace; only its own reading waits for it.
            await self._writer.drain()
            await self._charge(len(message))
        self._tell_departed(found)

    def _tell_departed(self, found: list[Entry]) -> None:
        """Announced but no longer connected here: told, as those who watched were told when it happened."""
        for entry in found:
            if entry.peer in self._meeting.registry.departed:
                self._me.send(Gone(entry.peer))


def _not_yet(frame: memoryview) -> bool:
    """Nobody's frames are carried before the login."""
    return False


def _retry_after(wait_s: float) -> dict[str, str]:
    return {"Retry-After": str(math.ceil(wait_s))}


def _close_reason(reason: str) -> bytes:
    """As much of a sentence as a close frame holds (RFC 6455 §5.5)."""
    return reason.encode()[:120].decode(errors="ignore").encode()
