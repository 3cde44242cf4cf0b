"""Thousands of simulated peers in one process: as much of a relay client as a measurement of relays needs.

A real client takes ten times the memory and time, which would then be what is measured. Each of these logs in
with its own key, stays connected by the real client's rule for retries, and renews its announcement.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import time
from collections.abc import Callable

import orjson
from msgspec import Struct
from yarl import URL

from shared.announcement import LEASE_S, sign_announcement
from shared.identity import Identity
from shared.protocol import Announce, Announcement, Login, SignedRecord, encode
from shared.relay_client import LOGIN_DOMAIN, login_payload, retry_delay
from shared.settings import relay_url

_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10
_STEADY_S = 10.0
# Together they dial no faster than the system takes connections.
DIALLING_AT_ONCE = 200


class LightPeer(asyncio.Protocol):
    """One participant over a bare WebSocket (RFC 6455). `heard` gets the text of every message but logins."""

    def __init__(
        self, url: str, dialling: asyncio.Semaphore, heard: Callable[[LightPeer, bytes], None]
    ) -> None:
        self.identity = Identity.generate()
        self.ready = False
        self.back = asyncio.Event()
        """Set while logged in."""
        self.record: SignedRecord | None = None
        """The newest announcement; it is repeated after every login."""
        self.logins = 0
        self._url: URL = relay_url(url)
        self._dialling = dialling
        self._heard = heard
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._upgraded = False
        self._retry_after_s = 0.0
        self._lost = asyncio.Event()

    async def stay(self) -> None:
        """Be connected until cancelled."""
        failures = 0
        while True:
            started = time.monotonic()
            self._retry_after_s = 0.0
            await self._connect_once()
            failures = 1 if time.monotonic() - started > _STEADY_S else failures + 1
            await asyncio.sleep(retry_delay(failures, self._retry_after_s, random.random()))

    async def _connect_once(self) -> None:
        self._buffer.clear()
        self._upgraded = False
        self._lost.clear()
        loop = asyncio.get_running_loop()
        try:
            async with self._dialling:
                await loop.create_connection(lambda: self, self._url.host or "", self._url.port or 0)
        except OSError:
            return
        try:
            await self._lost.wait()
        finally:
            if self._transport is not None:
                self._transport.abort()

    def send(self, message: Struct) -> None:
        """Send a message; one who is not connected says nothing."""
        if self.ready:
            self._frame(_TEXT, encode(message))

    def announce(self, model: str, layers: tuple[int, int]) -> None:
        """Say anew what this peer serves."""
        now = time.time()
        said = Announcement(
            peer=self.identity.id,
            sequence=int(now * 1000),
            issued_at=now,
            expires_at=now + LEASE_S,
            state="serving",
            name=f"peer {self.identity.id[:6]}",
            model=model,
            artefact="a" * 64,
            tokenizer="b" * 64,
            layer_count=80,
            start=layers[0],
            end=layers[1],
            dtype="bfloat16",
            device="cuda",
            context_length=8192,
            kv_tokens_free=120_000,
            ms_per_layer=1.25,
            relays=[str(self._url)],
        )
        self.record = sign_announcement(self.identity, said)
        self.send(Announce(self.record))

    # ------------------------------------------------------------ what asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET {self._url.path} HTTP/1.1\r\nHost: {self._url.host_port_subcomponent}\r\n"
            f"Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.ready = False
        self.back.clear()
        self._lost.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded and not self._upgrade():
            return
        while (frame := self._next_frame()) is not None:
            self._received(*frame)

    def _upgrade(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        if not self._buffer.startswith(b"HTTP/1.1 101"):
            assert self._transport is not None
            self._transport.abort()
            return False
        del self._buffer[: end + 4]
        self._upgraded = True
        return True

    def _next_frame(self) -> tuple[int, bytes] | None:
        """Kind and payload of the next whole frame; relays send no fragments and no masks."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        length, start = buffer[1], 2
        if length == 126:
            length, start = int.from_bytes(buffer[2:4]), 4
        elif length == 127:
            length, start = int.from_bytes(buffer[2:10]), 10
        if len(buffer) < start + length:
            return None
        kind, payload = buffer[0] & 15, bytes(buffer[start : start + length])
        del buffer[: start + length]
        return kind, payload

    def _received(self, kind: int, payload: bytes) -> None:
        if kind == _TEXT:
            if self.ready:
                self._told(payload)
            else:
                self._log_in(orjson.loads(payload))
        elif kind == _PING:
            self._frame(_PONG, payload)
        elif kind == _CLOSE:
            self._frame(_CLOSE, payload[:2])

    def _log_in(self, message: dict[str, str]) -> None:
        match message["type"]:
            case "challenge":
                payload = login_payload(message["nonce"], self._url.host_port_subcomponent or "")
                signature = self.identity.sign(LOGIN_DOMAIN, payload).hex()
                self._frame(_TEXT, encode(Login(self.identity.id, signature)))
            case "welcome":
                self.ready = True
                self.logins += 1
                self.back.set()
                if self.record is not None:
                    self.send(Announce(self.record))

    def _told(self, text: bytes) -> None:
        if text.startswith(b'{"type":"restarting"'):
            self._retry_after_s = orjson.loads(text)["retry_after_s"]
        else:
            self._heard(self, text)

    def _frame(self, kind: int, payload: bytes) -> None:
        if self._transport is None:
            return
        length = len(payload)
        # A mask of zeros is a mask, and leaves the payload as it is.
        if length < 126:
            head = bytes((0x80 | kind, 0x80 | length))
        else:
            head = bytes((0x80 | kind, 0xFE)) + length.to_bytes(2)
        self._transport.write(head + bytes(4) + payload)
