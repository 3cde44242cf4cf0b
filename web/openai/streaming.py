"""An answer as server-sent events: what all dialects of the API do alike, from first to last."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from aiohttp import web

from web.event_stream import EventStream, with_pauses
from web.openai.errors import ApiError, api_error

Json = dict[str, Any]
Event = TypeVar("Event")


class Teller(Generic[Event]):
    """How a dialect tells what happens: each method gives the JSON of events, in order."""

    names_events: ClassVar[bool] = False
    """Whether an event's `type` is also its name."""
    last: ClassVar[bytes] = b""
    """What a stream ends with when all went well. Without it, clients take the end for a failure."""

    def begin(self) -> list[Json]:
        raise NotImplementedError

    def take(self, event: Event) -> list[Json]:
        raise NotImplementedError

    def end(self) -> list[Json]:
        return []

    def fail(self, error: ApiError) -> list[Json]:
        return [error.as_json()]


async def stream_answer(
    http: web.Request,
    events: AsyncIterator[Event],
    teller: Teller[Event],
    *,
    keepalive_s: float,
    headers: dict[str, str] | None = None,
) -> web.StreamResponse:
    """Tell each event as it comes, with comments where it is quiet."""
    async with aclosing(with_pauses(events, keepalive_s)) as paced:
        # What fails before anything happened, such as a full swarm, still becomes a status of its own.
        first = await anext(paced)
        stream = await EventStream.open(http, headers)
        try:
            await _send(stream, teller, teller.begin())
            await _tell(stream, teller, first)
            async for event in paced:
                await _tell(stream, teller, event)
            await _send(stream, teller, teller.end())
        except ConnectionError:
            raise  # the client left
        except Exception as error:
            await _send(stream, teller, teller.fail(api_error(error)))
        else:
            if teller.last:
                await stream.send_raw(teller.last)
    return await stream.close()


async def _tell(stream: EventStream, teller: Teller[Event], event: Event | None) -> None:
    await (stream.keep_alive() if event is None else _send(stream, teller, teller.take(event)))


async def _send(stream: EventStream, teller: Teller[Event], values: Iterable[Json]) -> None:
    for value in values:
        await stream.send(value, name=value["type"] if teller.names_events else "")
