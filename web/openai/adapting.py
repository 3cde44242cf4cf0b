"""What adapters of other dialects share: a question as a chat, its answer as events of one conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from aiohttp import web

from web.access import user_of
from web.openai.asking import Asker, ChatEvent, Question
from web.openai.requests import read_chat
from web.openai.streaming import Teller, stream_answer

Json = dict[str, Any]


async def ask(asker: Asker, http: web.Request, chat: Json) -> Question:
    """The question of a chat's body, which an adapter has made of its own. Raises ApiError."""
    asked, messages = read_chat(chat)
    return await asker.conversation(asked, messages, user_of(http))


async def respond(
    http: web.Request,
    asker: Asker,
    question: Question,
    dialect: Dialect,
    *,
    stream: bool | None,
    keepalive_s: float,
) -> web.StreamResponse:
    """The one answer in this dialect, as a stream or whole."""
    async with aclosing(_only_answer(asker, question)) as events:
        if stream:
            return await stream_answer(
                http, events, dialect, keepalive_s=keepalive_s, headers=question.headers
            )
        dialect.begin()
        async for event in events:
            dialect.take(event)
    return web.json_response(body=orjson.dumps(dialect.view()), headers=question.headers)


async def _only_answer(asker: Asker, question: Question) -> AsyncGenerator[ChatEvent, None]:
    """The events of the one answer."""
    async with aclosing(asker.choices(question)) as events:
        async for _, event in events:
            yield event


class Dialect(Teller[ChatEvent]):
    """Another's words for a chat's answer."""

    names_events = True

    def view(self) -> Json:
        """The whole answer, once all events are taken."""
        raise NotImplementedError
