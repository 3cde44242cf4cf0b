"""Server-sent events (text/event-stream): one answer that stays open and tells JSON as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

import orjson
from aiohttp import web

Item = TypeVar("Item")

KEEPALIVE_S = 10.0
"""Proxies give up on connections that say nothing, often after 30 or 60 s."""


class EventStream:
    """An open stream to one client. Writing waits for the client, so nothing piles up here."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response

    @classmethod
    async def open(cls, request: web.Request, headers: dict[str, str] | None = None) -> EventStream:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **(headers or {}),
            }
        )
        await response.prepare(request)
        return cls(response)

    async def send(self, value: Any, *, name: str = "") -> None:  # noqa: ANN401 - any JSON
        named = b"event: " + name.encode() + b"\n" if name else b""
        await self._response.write(named + b"data: " + orjson.dumps(value) + b"\n\n")

    async def send_raw(self, data: bytes) -> None:
        """One event; `data` has no line break."""
        await self._response.write(b"data: " + data + b"\n\n")

    async def keep_alive(self) -> None:
        """A comment, which clients skip."""
        await self._response.write(b": keepalive\n\n")

    async def close(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response


async def with_pauses(items: AsyncIterator[Item], quiet_s: float) -> AsyncGenerator[Item | None, None]:
    """The items as they come, and None whenever none came for `quiet_s`; no item is lost by that."""
    while True:
        coming = asyncio.ensure_future(anext(items))
        try:
            while not (await asyncio.wait({coming}, timeout=quiet_s))[0]:
                yield None
            yield coming.result()
        except StopAsyncIteration:
            return
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
