"""Participants for the relay's tests: well-behaved ones, and bare connections that may say anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec

from relay.app import Relay
from shared.announcement import sign_announcement
from shared.identity import Identity, PeerId
from shared.protocol import (
    Announcement,
    Challenge,
    Denied,
    FromRelay,
    Login,
    SignedRecord,
    Welcome,
    decode,
    encode,
)
from shared.relay_client import LOGIN_DOMAIN, RelayClient, login_payload

SOON_S = 5.0
"""Longer than anything here takes; a test that waits this long has failed."""


def announcement(identity: Identity, now: float | None = None, **changes: Any) -> Announcement:  # noqa: ANN401
    """What a peer with layers 0–4 of 8 would say of itself at `now`."""
    now = time.time() if now is None else now
    fields: dict[str, Any] = {
        "peer": identity.id,
        "sequence": int(now * 1000),
        "issued_at": now,
        "expires_at": now + 45,
        "state": "serving",
        "name": "ann",
        "model": "demo",
        "artefact": "a" * 64,
        "tokenizer": "b" * 64,
        "layer_count": 8,
        "start": 0,
        "end": 4,
        "dtype": "float32",
        "device": "cpu",
        "context_length": 2048,
        "kv_tokens_free": 1000,
    }
    return Announcement(**(fields | changes))


def announced(identity: Identity, now: float | None = None, **changes: Any) -> SignedRecord:  # noqa: ANN401
    return sign_announcement(identity, announcement(identity, now, **changes))


def said(record: SignedRecord) -> Announcement:
    spoken: Announcement = decode(record.body, Announcement)
    return spoken


class Heard:
    """Everything that a relay client told, in order of arrival, with a way to wait for the next."""

    def __init__(self, client: RelayClient) -> None:
        self.records: asyncio.Queue[SignedRecord] = asyncio.Queue()
        self.signals: asyncio.Queue[msgspec.Struct] = asyncio.Queue()
        self.frames: asyncio.Queue[tuple[PeerId, bytes]] = asyncio.Queue()
        self.gone: asyncio.Queue[PeerId] = asyncio.Queue()
        self.dropped: asyncio.Queue[PeerId] = asyncio.Queue()
        self.denied: asyncio.Queue[str] = asyncio.Queue()
        self.states: asyncio.Queue[bool] = asyncio.Queue()
        client.on_signal(self.signals.put_nowait)
        client.on_frame(lambda peer, payload: self.frames.put_nowait((peer, bytes(payload))))
        client.on_gone(self.gone.put_nowait)
        client.on_dropped(self.dropped.put_nowait)
        client.on_denied(self.denied.put_nowait)
        client.on_state(self.states.put_nowait)


class Party:
    """A participant with its client and what it heard."""

    def __init__(self, url: str, identity: Identity | None = None) -> None:
        self.identity = identity or Identity.generate()
        self.id = self.identity.id
        self.client = RelayClient(url, self.identity)
        self.heard = Heard(self.client)

    def watch(self, model: str | None = None) -> None:
        self.client.watch(self.heard.records.put_nowait, model)

    async def hears(self, record: SignedRecord) -> None:
        """Wait for a record, past others: a watcher may hear one twice."""
        while await soon(self.heard.records) != record:
            pass


@asynccontextmanager
async def party(relay: Relay, identity: Identity | None = None) -> AsyncIterator[Party]:
    one = Party(relay.url, identity)
    async with one.client:
        yield one


class Wire:
    """A bare WebSocket to a relay."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, identity: Identity, host: str) -> None:
        self.socket = socket
        self.identity = identity
        self.host = host

    async def say(self, message: msgspec.Struct) -> None:
        await self.socket.send_str(encode(message).decode())

    async def hear(self) -> FromRelay:
        """The next control message. Fails when the connection ends instead."""
        received = await asyncio.wait_for(self.socket.receive(), SOON_S)
        assert received.type is aiohttp.WSMsgType.TEXT, f"expected a message, got {received}"
        message: FromRelay = decode(received.data, FromRelay)
        return message

    async def denied(self) -> Denied:
        message = await self.hear()
        assert isinstance(message, Denied), message
        return message

    async def ended(self) -> int | None:
        """Wait for the relay to close the connection; returns the code it gave."""
        received = await asyncio.wait_for(self.socket.receive(), SOON_S)
        assert received.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED), received
        return received.data if received.type is aiohttp.WSMsgType.CLOSE else self.socket.close_code

    async def login(self, host: str | None = None) -> None:
        """Answer the challenge as it should be, or for another host."""
        challenge = await self.hear()
        assert isinstance(challenge, Challenge)
        payload = login_payload(challenge.nonce, self.host if host is None else host)
        await self.say(Login(self.identity.id, self.identity.sign(LOGIN_DOMAIN, payload).hex()))

    async def welcomed(self) -> Welcome:
        message = await self.hear()
        assert isinstance(message, Welcome), message
        return message

    def die(self) -> None:
        """End the TCP connection without a word, as a killed process does."""
        connection = self.socket._response.connection
        assert connection is not None and connection.transport is not None
        connection.transport.abort()


@asynccontextmanager
async def stranger(relay: Relay, identity: Identity | None = None, **headers: str) -> AsyncIterator[Wire]:
    """A connection that has not logged in."""
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{relay.url}/ws", headers=headers, max_msg_size=0) as socket,
    ):
        host = headers.get("Host", relay.url.removeprefix("http://"))
        yield Wire(socket, identity or Identity.generate(), host)


@asynccontextmanager
async def member(relay: Relay, identity: Identity | None = None) -> AsyncIterator[Wire]:
    """A connection that has logged in, and from there on may say anything."""
    async with stranger(relay, identity) as wire:
        await wire.login()
        await wire.welcomed()
        yield wire


Item = TypeVar("Item")


async def soon(queue: asyncio.Queue[Item]) -> Item:
    """The next item, which is on its way already."""
    return await asyncio.wait_for(queue.get(), SOON_S)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that tells nobody when it happens."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - such as the disk, or a socket's buffer
            await asyncio.sleep(0.002)
