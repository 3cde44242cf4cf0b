"""POST /v1/chat/completions: a conversation in, the assistant's next answer out, whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, assert_never

import orjson
from aiohttp import web

from shared.client.session import Rerouted
from web.access import user_of
from web.chat import Ended, FinishReason, PromptScored, Said
from web.line import Waiting
from web.openai.asking import Asker, ChatEvent, Question, logprobs_view, timings_view, usage_view
from web.openai.requests import ChatRequest, read_chat, read_json
from web.openai.streaming import Teller, stream_answer
from web.openai.tools import Argued, Called

Json = dict[str, Any]


class ChatCompletions:
    """The one handler, and what it works with."""

    def __init__(self, asker: Asker, keepalive_s: float) -> None:
        self._asker = asker
        self._keepalive_s = keepalive_s

    async def post(self, http: web.Request) -> web.StreamResponse:
        asked, messages = read_chat(await read_json(http))
        question = await self._asker.conversation(asked, messages, user_of(http))
        reply = _Reply(asked, question)
        async with aclosing(self._asker.choices(question)) as events:
            if asked.stream:
                chunks = _Chunks(self._asker, reply)
                return await stream_answer(
                    http, events, chunks, keepalive_s=self._keepalive_s, headers=question.headers
                )
            return await self._whole(reply, events)

    async def _whole(self, reply: _Reply, events: AsyncIterator[tuple[int, ChatEvent]]) -> web.Response:
        choices = [WholeChoice() for _ in range(reply.question.choices)]
        async for index, event in events:
            choices[index].take(event)
        body = reply.whole(choices)
        if reply.asked.wants_route:
            body["swarm"] = {
                "tokens": self._asker.tokens_view([token for choice in choices for token in choice.tokens]),
                "events": [
                    self._asker.reroute_view(event) for choice in choices for event in choice.reroutes
                ],
            }
        last = choices[-1]
        headers = reply.question.headers | self._asker.route_headers(last.ended, last.tokens)
        return web.json_response(body=orjson.dumps(body), headers=headers)


# ---------------------------------------------------------------- answering


def call_view(called: Called, arguments: str = "") -> Json:
    function = {"name": called.name, "arguments": arguments}
    return {"index": called.index, "id": called.id, "type": "function", "function": function}


class WholeChoice:
    """One answer, collected from its events."""

    def __init__(self) -> None:
        self.said: list[Said] = []
        self.tokens: list[Any] = []
        self.reroutes: list[Rerouted] = []
        self.calls: list[Called] = []
        self.arguments: list[str] = []
        self.ended = Ended("stop", [], 0)

    def take(self, event: ChatEvent) -> None:
        match event:
            case Said():
                self.said.append(event)
                self.tokens += event.tokens
            case Called():
                self.calls.append(event)
                self.arguments.append("")
            case Argued():
                self.arguments[event.index] += event.text
            case Rerouted():
                self.reroutes.append(event)
            case Ended():
                self.tokens += event.tokens
                self.ended = event
            case PromptScored() | Waiting():
                pass
            case _:
                assert_never(event)

    @property
    def text(self) -> str:
        return "".join(said.text for said in self.said)

    @property
    def message(self) -> Json:
        message: Json = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message["content"] = self.text or None
            message["tool_calls"] = [
                {key: value for key, value in call_view(call, arguments).items() if key != "index"}
                for call, arguments in zip(self.calls, self.arguments, strict=True)
            ]
        return message


class _Reply:
    """The objects of one reply: all of them carry the same id, time, model and fingerprint."""

    def __init__(self, asked: ChatRequest, question: Question) -> None:
        self.asked = asked
        self.question = question
        self._prompt_tokens = len(question.request.prompt)
        self._ended: list[Ended] = []
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def ended(self, event: Ended) -> None:
        self._ended.append(event)

    def whole(self, choices: list[WholeChoice]) -> Json:
        self._ended = [choice.ended for choice in choices]
        views = [
            {
                "index": index,
                "message": choice.message,
                "logprobs": self._logprobs(choice.said),
                "finish_reason": choice.ended.reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head("chat.completion"), "choices": views, **self._end()}

    def chunk(
        self,
        index: int,
        delta: Json,
        *,
        said: Said | None = None,
        reason: FinishReason | None = None,
        swarm: Json | None = None,
    ) -> Json:
        logprobs = self._logprobs([said]) if said and said.texts else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.asked.wants_usage:
            chunk["usage"] = None
        if swarm is not None:
            chunk["swarm"] = swarm
        return chunk

    def usage_chunk(self) -> Json:
        return {**self._head("chat.completion.chunk"), "choices": [], **self._end()}

    def _logprobs(self, said: list[Said]) -> Json | None:
        if not self.asked.logprobs or self.question.reads_calls:
            return None
        return logprobs_view([text for each in said for text in each.texts], self.question.tokenizer)

    def _head(self, kind: str) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.question.model.name,
            "system_fingerprint": fingerprint(self.question),
        }

    def _end(self) -> Json:
        count = sum(ended.token_count for ended in self._ended)
        return {
            "usage": usage_view(self._prompt_tokens, count),
            "timings": timings_view(self._prompt_tokens, self._ended[-1]),
        }


class _Chunks(Teller[tuple[int, ChatEvent]]):
    """A reply as a stream of chunks."""

    last = b"[DONE]"

    def __init__(self, asker: Asker, reply: _Reply) -> None:
        self._asker = asker
        self._reply = reply

    def begin(self) -> list[Json]:
        said = {"role": "assistant", "content": ""}
        return [self._reply.chunk(index, said) for index in range(self._reply.question.choices)]

    def take(self, event: tuple[int, ChatEvent]) -> list[Json]:
        chunk = self._chunk(*event)
        return [] if chunk is None else [chunk]

    def end(self) -> list[Json]:
        return [self._reply.usage_chunk()] if self._reply.asked.wants_usage else []

    def _chunk(self, index: int, event: ChatEvent) -> Json | None:
        """What a client sees of an event."""
        reply = self._reply
        match event:
            case Said():
                route = self._route(event)
                if not event.text and not event.texts and route is None:
                    return None
                delta = {"content": event.text} if event.text or event.texts else {}
                return reply.chunk(index, delta, said=event, swarm=route)
            case Called():
                return reply.chunk(index, {"tool_calls": [call_view(event)]})
            case Argued():
                argued = {"index": event.index, "function": {"arguments": event.text}}
                return reply.chunk(index, {"tool_calls": [argued]})
            case Waiting():
                if not reply.asked.wants_route:
                    return None
                return reply.chunk(index, {}, swarm={"waiting": event.place})
            case Rerouted():
                if not reply.asked.wants_route:
                    return None
                return reply.chunk(index, {}, swarm={"event": self._asker.reroute_view(event)})
            case Ended():
                reply.ended(event)
                return reply.chunk(index, {}, reason=event.reason, swarm=self._route(event))
            case PromptScored():
                return None
            case _:
                assert_never(event)

    def _route(self, event: Said | Ended) -> Json | None:
        if not self._reply.asked.wants_route:
            return None
        if isinstance(event, Said) and not event.tokens and not event.text:
            return None
        return {"tokens": self._asker.tokens_view(event.tokens)}


def fingerprint(question: Question) -> str:
    """The artefact names the exact weights and how they are quantized."""
    return f"fp_{question.model.artefact[:12]}"
