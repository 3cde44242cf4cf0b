"""POST /v1/chat/completions: a conversation in, the assistant's next answer out, whole or as a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, assert_never

import orjson
from aiohttp import web

from shared.client.directory import ServedModel
from shared.client.session import Request, Rerouted
from web.access import user_of
from web.chat import AnswerEvent, Ended, FinishReason, Said, answer
from web.event_stream import EventStream, with_pauses
from web.line import Waiting, WaitingLines
from web.openai.errors import api_error, bad_request
from web.openai.models import Models
from web.openai.requests import ChatRequest, read_chat, read_json, sampling_of
from web.route_view import reroute_view, tokens_view
from web.swarm import Swarm
from web.tokenizer import ModelTokenizer, Rendered
from web.tokenizer_cache import TokenizerCache

Json = dict[str, Any]

DEFAULT_MAX_TOKENS = 1024
"""When the client names no limit. Peers reserve memory for all of it: the whole context would be greedy."""


class ChatCompletions:
    """The one handler, and what it works with."""

    def __init__(
        self,
        swarm: Swarm,
        lines: WaitingLines,
        models: Models,
        tokenizers: TokenizerCache,
        keepalive_s: float,
    ) -> None:
        self._swarm = swarm
        self._lines = lines
        self._models = models
        self._tokenizers = tokenizers
        self._keepalive_s = keepalive_s

    async def post(self, http: web.Request) -> web.StreamResponse:
        asked, messages = read_chat(await read_json(http))
        model = self._models.find(asked.model)
        tokenizer = await self._tokenizers.get(model.artefact)
        prompt = await asyncio.to_thread(tokenizer.render, messages, asked.tools or [])
        request = _swarm_request(asked, model, tokenizer, prompt)
        reply = _Reply(asked, model, len(prompt.tokens))
        headers = _warning_headers(asked, tokenizer)
        drawn = self._lines.generate(user_of(http), request)
        events = answer(drawn, tokenizer.decode, [*asked.stops, *prompt.stops])
        async with aclosing(events):
            if asked.stream:
                return await self._stream(http, reply, events, headers)
            return await self._whole(reply, events, headers)

    # ------------------------------------------------------------ whole

    async def _whole(
        self, reply: _Reply, events: AsyncIterator[AnswerEvent], headers: dict[str, str]
    ) -> web.Response:
        text: list[str] = []
        tokens: list[Json] = []
        reroutes: list[Json] = []
        async for event in events:
            match event:
                case Said():
                    text.append(event.text)
                    tokens += tokens_view(event.tokens, self._swarm.directory)
                case Waiting():
                    pass
                case Rerouted():
                    reroutes.append(reroute_view(event, self._swarm.directory))
                case Ended():
                    tokens += tokens_view(event.tokens, self._swarm.directory)
                    ended = event
                case _:
                    assert_never(event)
        body = reply.whole("".join(text), ended)
        if reply.asked.wants_route:
            body["swarm"] = {"tokens": tokens, "events": reroutes}
        return web.json_response(body=orjson.dumps(body), headers=headers)

    # ------------------------------------------------------------ stream

    async def _stream(
        self,
        http: web.Request,
        reply: _Reply,
        events: AsyncIterator[AnswerEvent],
        headers: dict[str, str],
    ) -> web.StreamResponse:
        async with aclosing(with_pauses(events, self._keepalive_s)) as paced:
            # What fails before anything happened, such as a full swarm, still becomes a status of its own.
            first = await anext(paced)
            stream = await EventStream.open(http, headers)
            try:
                await stream.send(reply.chunk({"role": "assistant", "content": ""}))
                await self._send(stream, reply, first)
                async for event in paced:
                    await self._send(stream, reply, event)
            except ConnectionError:
                raise  # the client left
            except Exception as error:
                # The status is out already. Without [DONE], clients take this for the failure it is.
                await stream.send(api_error(error).as_json())
            else:
                await stream.send_raw(b"[DONE]")
        return await stream.close()

    async def _send(self, stream: EventStream, reply: _Reply, event: AnswerEvent | None) -> None:
        match event:
            case None:
                await stream.keep_alive()
            case Said():
                await stream.send(reply.chunk({"content": event.text}, swarm=self._tokens(reply, event)))
            case Waiting():
                if reply.asked.wants_route:
                    await stream.send(reply.chunk({}, swarm={"waiting": event.place}))
            case Rerouted():
                if reply.asked.wants_route:
                    view = {"event": reroute_view(event, self._swarm.directory)}
                    await stream.send(reply.chunk({}, swarm=view))
            case Ended():
                await stream.send(reply.chunk({}, reason=event.reason, swarm=self._tokens(reply, event)))
                if reply.asked.wants_usage:
                    await stream.send(reply.usage_chunk(event))
            case _:
                assert_never(event)

    def _tokens(self, reply: _Reply, event: Said | Ended) -> Json | None:
        if not reply.asked.wants_route:
            return None
        return {"tokens": tokens_view(event.tokens, self._swarm.directory)}


# ---------------------------------------------------------------- asking


def _swarm_request(
    asked: ChatRequest, model: ServedModel, tokenizer: ModelTokenizer, prompt: Rendered
) -> Request:
    """Raises ApiError when the conversation leaves no room for an answer."""
    room = model.context_length - len(prompt.tokens)
    if room < 1:
        raise bad_request(
            f"this model's maximum context length is {model.context_length} tokens, but the conversation"
            f" takes {len(prompt.tokens)} and leaves no room for an answer: shorten it",
            param="messages",
            code="context_length_exceeded",
        )
    wanted = asked.max_completion_tokens or asked.max_tokens or DEFAULT_MAX_TOKENS
    return Request(
        artefact=model.artefact,
        prompt=prompt.tokens,
        max_new_tokens=min(wanted, room),
        sampling=sampling_of(asked, tokenizer.sampling),
        stop_tokens=tokenizer.stop_tokens,
    )


def _warning_headers(asked: ChatRequest, tokenizer: ModelTokenizer) -> dict[str, str]:
    """What a client asked for and does not get. Many ask for tools by habit, so refusing would break them."""
    warnings: list[str] = []
    if asked.tools:
        known = tokenizer.takes_tools
        warnings.append(
            "calls of tools come as text"
            if known
            else "this model's chat template knows no tools: they were left out"
        )
    if asked.logprobs:
        warnings.append("logprobs are not given")
    if asked.response_format and asked.response_format.get("type") not in (None, "text"):
        warnings.append("response_format is not enforced: the answer is free text")
    return {"x-swarm-warning": "; ".join(warnings)} if warnings else {}


# ---------------------------------------------------------------- answering


class _Reply:
    """The objects of one answer: all of them carry the same id, time, model and fingerprint."""

    def __init__(self, asked: ChatRequest, model: ServedModel, prompt_tokens: int) -> None:
        self.asked = asked
        self._prompt_tokens = prompt_tokens
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model.name
        self._fingerprint = f"fp_{model.artefact[:12]}"
        """The artefact names the exact weights and how they are quantized."""

    def whole(self, text: str, ended: Ended) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ended.reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(ended)}

    def chunk(self, delta: Json, *, reason: FinishReason | None = None, swarm: Json | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.asked.wants_usage:
            chunk["usage"] = None
        if swarm is not None:
            chunk["swarm"] = swarm
        return chunk

    def usage_chunk(self, ended: Ended) -> Json:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(ended)}

    def _head(self, kind: str) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _usage(self, ended: Ended) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": ended.token_count,
            "total_tokens": self._prompt_tokens + ended.token_count,
        }
