"""POST /v1/messages: Anthropic's dialect, as a thin adapter over chats, for clients that know no other."""

from __future__ import annotations

import secrets
from http import HTTPStatus
from typing import Annotated, Any, Literal

import orjson
from aiohttp import web
from msgspec import Meta, Struct

from web.chat import Ended, Said
from web.openai.adapting import Dialect, ask, respond
from web.openai.asking import Asker, ChatEvent, Question
from web.openai.errors import ApiError, api_error, bad_request
from web.openai.requests import Fraction, Temperature, read_json, read_struct
from web.openai.tools import Argued, Called

Json = dict[str, Any]

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Block(Struct, frozen=True, kw_only=True):
    """A piece of a message: text, a call of a tool, or what a tool gave back."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class Turn(Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class TheirTool(Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class Choice(Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class MessagesRequest(Struct, frozen=True, kw_only=True):
    """The body of POST /v1/messages."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    max_tokens: int | None = None
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: int | None = None
    stream: bool | None = None
    tools: list[TheirTool] | None = None
    tool_choice: Choice | None = None


class Messages:
    """The handlers, and what they work with."""

    def __init__(self, asker: Asker, keepalive_s: float) -> None:
        self._asker = asker
        self._keepalive_s = keepalive_s

    async def post(self, http: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(http)
        except (ConnectionError, web.HTTPException):
            raise
        except Exception as error:
            return _error_response(api_error(error))

    async def count_tokens(self, http: web.Request) -> web.StreamResponse:
        try:
            asked = read_struct(await read_json(http), MessagesRequest)
            question = await ask(self._asker, http, _as_chat(asked))
            return web.json_response({"input_tokens": len(question.request.prompt)})
        except (ConnectionError, web.HTTPException):
            raise
        except Exception as error:
            return _error_response(api_error(error))

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        asked = read_struct(await read_json(http), MessagesRequest)
        if asked.max_tokens is None:
            raise bad_request("max_tokens: say how long the answer may be", "max_tokens")
        question = await ask(self._asker, http, _as_chat(asked))
        dialect = _Message(question, asked.stop_sequences or [])
        return await respond(
            http, self._asker, question, dialect, stream=asked.stream, keepalive_s=self._keepalive_s
        )


# ---------------------------------------------------------------- asking


def _as_chat(asked: MessagesRequest) -> Json:
    messages: list[Json] = []
    if asked.system:
        messages.append({"role": "system", "content": _text(asked.system, "system")})
    for index, turn in enumerate(asked.messages):
        messages += _as_messages(turn, f"messages[{index}]")
    chat: Json = {"model": asked.model, "messages": messages}
    wishes = {
        "max_tokens": asked.max_tokens,
        "stop": asked.stop_sequences,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
    }
    chat |= {name: wish for name, wish in wishes.items() if wish is not None}
    if asked.tools:
        chat["tools"] = [_as_tool(tool, f"tools[{index}]") for index, tool in enumerate(asked.tools)]
    if asked.tool_choice is not None:
        chat["tool_choice"] = _as_choice(asked.tool_choice)
    return chat


def _as_messages(turn: Turn, where: str) -> list[Json]:
    """One turn of theirs may be several messages: what tools gave back is not the user's."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    messages: list[Json] = []
    texts: list[str] = []
    calls: list[Json] = []
    for block in turn.content:
        match block.type:
            case "text":
                texts.append(block.text or "")
            case "tool_use":
                arguments = orjson.dumps(block.input or {}).decode()
                function = {"name": block.name or "", "arguments": arguments}
                calls.append({"id": block.id or "", "type": "function", "function": function})
            case "tool_result":
                content = _text(block.content or "", where)
                messages.append({"role": "tool", "tool_call_id": block.tool_use_id or "", "content": content})
            case "thinking" | "redacted_thinking":
                pass  # it was not said
            case _:
                raise bad_request(f"{where}: blocks of type {block.type[:50]!r} are not read here", where)
    if texts or calls or not messages:
        said: Json = {"role": turn.role, "content": "\n".join(texts)}
        messages.append(said | ({"tool_calls": calls} if calls else {}))
    return messages


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    if any(block.type != "text" for block in content):
        raise bad_request(f"{where}: only text is read", where)
    return "\n".join(block.text or "" for block in content)


def _as_tool(tool: TheirTool, where: str) -> Json:
    if tool.input_schema is None:
        raise bad_request(f"{where}: tools of type {str(tool.type)[:50]!r} do not run here", where)
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _as_choice(choice: Choice) -> str | Json:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


# ---------------------------------------------------------------- answering


class _Message(Dialect):
    """One message: its blocks as they grow, and the events that tell of it."""

    def __init__(self, question: Question, stops: list[str]) -> None:
        self._question = question
        self._stops = stops
        self._id = f"msg_{secrets.token_hex(12)}"
        self._blocks: list[Json] = []
        self._arguments: list[str] = []
        self._open = False
        self._reason: str | None = None
        self._stop: str | None = None
        self._count = 0

    def begin(self) -> list[Json]:
        return [{"type": "message_start", "message": self.view()}]

    def take(self, event: ChatEvent) -> list[Json]:
        match event:
            case Said(text=text) if text:
                opened = []
                if not self._open or self._blocks[-1]["type"] != "text":
                    opened = [*self._close(), *self._begin({"type": "text", "text": ""})]
                self._blocks[-1]["text"] += text
                return [*opened, self._delta({"type": "text_delta", "text": text})]
            case Called():
                block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                self._arguments.clear()
                return [*self._close(), *self._begin(block)]
            case Argued(text=text):
                self._arguments.append(text)
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case Ended():
                return [*self._close(), *self._end(event)]
            case _:
                return []

    def fail(self, error: ApiError) -> list[Json]:
        return [_error_view(error)]

    def view(self) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._question.model.name,
            "content": [dict(block) for block in self._blocks],
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": {"input_tokens": len(self._question.request.prompt), "output_tokens": self._count},
        }

    def _begin(self, block: Json) -> list[Json]:
        self._open = True
        self._blocks.append(block)
        index = len(self._blocks) - 1
        return [{"type": "content_block_start", "index": index, "content_block": dict(block)}]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[Json]:
        if not self._open:
            return []
        self._open = False
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _arguments("".join(self._arguments))
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _end(self, ended: Ended) -> list[Json]:
        self._count = ended.token_count
        self._stop = ended.stop if ended.stop in self._stops else None
        reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
        self._reason = "stop_sequence" if self._stop else reasons[ended.reason]
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop}
        return [
            {"type": "message_delta", "delta": delta, "usage": {"output_tokens": self._count}},
            {"type": "message_stop"},
        ]


def _arguments(text: str) -> Json:
    """What a model wrote as arguments may be cut short."""
    try:
        read = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return read if isinstance(read, dict) else {}


def _error_view(error: ApiError) -> Json:
    kind = KINDS.get(
        error.status, "api_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else KINDS[400]
    )
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _error_response(error: ApiError) -> web.Response:
    return web.json_response(
        body=orjson.dumps(_error_view(error)), status=error.status, headers=error.headers()
    )
