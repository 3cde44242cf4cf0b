"""What adapters of other dialects share: a question as a chat, its answer as events of one conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from web.access import user_of
from web.event_stream import EventStream, with_pauses
from web.openai.asking import Asker, ChatEvent, Question
from web.openai.errors import ApiError, api_error
from web.openai.requests import read_chat

Json = dict[str, Any]


async def ask(asker: Asker, http: web.Request, chat: Json) -> Question:
    """The question of a chat's body, which an adapter has made of its own. Raises ApiError."""
    asked, messages = read_chat(chat)
    return await asker.conversation(asked, messages, user_of(http))


async def only_answer(asker: Asker, question: Question) -> AsyncGenerator[ChatEvent, None]:
    """The events of the one answer."""
    async with aclosing(asker.choices(question)) as events:
        async for _, event in events:
            yield event


async def stream_named(
    http: web.Request,
    question: Question,
    events: AsyncGenerator[ChatEvent, None],
    keepalive_s: float,
    dialect: Dialect,
) -> web.StreamResponse:
    """An answer in a dialect whose events have names, with comments where it is quiet."""
    async with aclosing(with_pauses(events, keepalive_s)) as paced:
        # What fails before anything happened still becomes a status of its own.
        first = await anext(paced)
        stream = await EventStream.open(http, question.headers)
        try:
            await _send(stream, dialect.begin())
            await _tell(stream, dialect, first)
            async for event in paced:
                await _tell(stream, dialect, event)
        except ConnectionError:
            raise  # the client left
        except Exception as error:
            await _send(stream, dialect.fail(api_error(error)))
    return await stream.close()


class Dialect:
    """How a dialect tells what happens: each method gives events, whose `type` is their name."""

    def begin(self) -> list[Json]:
        raise NotImplementedError

    def take(self, event: ChatEvent) -> list[Json]:
        raise NotImplementedError

    def fail(self, error: ApiError) -> list[Json]:
        raise NotImplementedError


async def _tell(stream: EventStream, dialect: Dialect, event: ChatEvent | None) -> None:
    await (stream.keep_alive() if event is None else _send(stream, dialect.take(event)))


async def _send(stream: EventStream, events: list[Json]) -> None:
    for event in events:
        await stream.send(event, name=event["type"])


async def collected(events: AsyncIterator[ChatEvent], dialect: Dialect) -> None:
    """A whole answer: the dialect keeps what it needs of the events."""
    dialect.begin()
    async for event in events:
        dialect.take(event)
