"""POST /v1/responses: OpenAI's newer dialect, as a thin adapter over chats. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

import msgspec
from aiohttp import web
from msgspec import Struct

from web.chat import Ended, Said
from web.openai.adapting import Dialect, ask, respond
from web.openai.asking import Asker, ChatEvent, Question, logprobs_view
from web.openai.errors import ApiError, bad_request
from web.openai.requests import (
    Function,
    JsonSchema,
    NamedFunction,
    NamedTool,
    Part,
    ResponseFormat,
    SamplingRequest,
    Tool,
    read_json,
    read_struct,
)
from web.openai.tools import Argued, Called

Json = dict[str, Any]


class InputItem(Struct, frozen=True, kw_only=True):
    """A message, the call of a tool, or what a tool gave back."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class FlatTool(Function, frozen=True, kw_only=True):
    """A tool in this dialect, which does not put the function in a box of its own."""

    type: Literal["function"] = "function"


class NamedChoice(Struct, frozen=True):
    name: str
    type: Literal["function"] = "function"


class TextFormat(JsonSchema, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextOptions(Struct, frozen=True):
    format: TextFormat | None = None


class ResponsesRequest(SamplingRequest, frozen=True, kw_only=True):
    """The body of POST /v1/responses."""

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    text: TextOptions | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None


class Responses:
    """The one handler, and what it works with."""

    def __init__(self, asker: Asker, keepalive_s: float) -> None:
        self._asker = asker
        self._keepalive_s = keepalive_s

    async def post(self, http: web.Request) -> web.StreamResponse:
        asked = read_struct(await read_json(http), ResponsesRequest)
        for field in ("previous_response_id", "conversation", "background"):
            if getattr(asked, field):
                raise bad_request(
                    f"{field}: nothing is kept here; send the whole conversation as input", field
                )
        question = await ask(self._asker, http, _as_chat(asked))
        dialect = _Response(asked, question)
        return await respond(
            http, self._asker, question, dialect, stream=asked.stream, keepalive_s=self._keepalive_s
        )


# ---------------------------------------------------------------- asking


def _as_chat(asked: ResponsesRequest) -> Json:
    chat: Json = {
        name: value
        for name in SamplingRequest.__struct_fields__
        if (value := getattr(asked, name)) is not None
    }
    chat |= {"model": asked.model, "messages": _messages(asked)}
    if asked.max_output_tokens is not None:
        chat["max_completion_tokens"] = asked.max_output_tokens
    if asked.tools:
        tools = [
            Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.parameters))
            for tool in asked.tools
        ]
        chat["tools"] = msgspec.to_builtins(tools)
    choice = asked.tool_choice
    if isinstance(choice, NamedChoice):
        chat["tool_choice"] = msgspec.to_builtins(NamedTool(NamedFunction(choice.name)))
    elif choice is not None:
        chat["tool_choice"] = choice
    if asked.text is not None and asked.text.format is not None:
        wanted = asked.text.format
        schema = JsonSchema(name=wanted.name, schema=wanted.schema) if wanted.type == "json_schema" else None
        chat["response_format"] = msgspec.to_builtins(ResponseFormat(type=wanted.type, json_schema=schema))
    if asked.top_logprobs is not None or "message.output_text.logprobs" in (asked.include or []):
        chat |= {"logprobs": True, "top_logprobs": asked.top_logprobs or 0}
    return chat


def _messages(asked: ResponsesRequest) -> list[Json]:
    messages: list[Json] = []
    if asked.instructions:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*messages, {"role": "user", "content": asked.input}]
    for index, item in enumerate(asked.input):
        where = f"input[{index}]"
        match item.type:
            case "message":
                messages.append({"role": item.role, "content": _text(item.content, where)})
            case "function_call":
                call = {
                    "id": item.call_id,
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments or "{}"},
                }
                if messages and "tool_calls" in messages[-1]:
                    messages[-1]["tool_calls"].append(call)
                else:
                    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            case "function_call_output":
                content = _text(item.output, where)
                messages.append({"role": "tool", "tool_call_id": item.call_id or "", "content": content})
            case "reasoning":
                pass  # what other models thought before; it was not said
            case _:
                raise bad_request(f"{where}: items of type {item.type[:50]!r} are not read here", where)
    return messages


def _text(content: str | list[Part] | None, where: str) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    texts = [part.text for part in content if part.type in ("input_text", "output_text", "text")]
    if len(texts) < len(content) or None in texts:
        raise bad_request(f"{where}: only text is read", where)
    return "\n".join(text for text in texts if text is not None)


# ---------------------------------------------------------------- answering


class _Response(Dialect):
    """One response: its items as they grow, and the events that tell of it."""

    def __init__(self, asked: ResponsesRequest, question: Question) -> None:
        self._asked = asked
        self._question = question
        self._id = f"resp_{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._items: list[Json] = []
        self._logprobs: list[Json] = []
        self._status = "in_progress"
        self._ended: Ended | None = None
        self._error: Json | None = None
        self._number = 0

    def begin(self) -> list[Json]:
        return [
            self._event(f"response.{state}", response=self.view()) for state in ("created", "in_progress")
        ]

    def take(self, event: ChatEvent) -> list[Json]:
        match event:
            case Said(text=text) if text or event.texts:
                return self._say(event)
            case Called():
                return [*self._close(), *self._call(event)]
            case Argued(text=text):
                item = self._items[-1]
                item["arguments"] += text
                return [self._of_item("response.function_call_arguments.delta", delta=text)]
            case Ended():
                return [*self._close(), *self._end(event)]
            case _:
                return []

    def fail(self, error: ApiError) -> list[Json]:
        self._status = "failed"
        self._error = {"code": error.code or "server_error", "message": str(error)}
        return [self._event("response.failed", response=self.view())]

    def view(self) -> Json:
        ended = self._ended
        cut = self._status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self._asked.instructions,
            "max_output_tokens": self._asked.max_output_tokens,
            "model": self._question.model.name,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": self._question.request.sampling.temperature,
            "top_p": self._question.request.sampling.top_p,
            "text": {"format": {"type": "text"}}
            if self._asked.text is None
            else msgspec.to_builtins(self._asked.text),
            "tool_choice": "auto" if self._asked.tool_choice is None else _plain(self._asked.tool_choice),
            "tools": _plain(self._asked.tools or []),
            "truncation": "disabled",
            "metadata": {},
            "usage": None if ended is None else self._usage(ended),
        }

    # ------------------------------------------------------------ items

    def _say(self, said: Said) -> list[Json]:
        events: list[Json] = []
        if (
            not self._items
            or self._items[-1]["type"] != "message"
            or self._items[-1]["status"] == "completed"
        ):
            events += [*self._close(), *self._open_message()]
        part = self._items[-1]["content"][0]
        part["text"] += said.text
        likely = logprobs_view(said.texts, self._question.tokenizer)["content"]
        part["logprobs"] += likely
        return [
            *events,
            self._of_item("response.output_text.delta", content_index=0, delta=said.text, logprobs=likely),
        ]

    def _open_message(self) -> list[Json]:
        part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item: Json = {
            "type": "message",
            "id": f"msg_{secrets.token_hex(12)}",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self._items.append(item)
        added = self._at("response.output_item.added", item=dict(item))
        begun = self._of_item("response.content_part.added", content_index=0, part=dict(part))
        item["content"] = [part]
        return [added, begun]

    def _call(self, called: Called) -> list[Json]:
        item: Json = {
            "type": "function_call",
            "id": f"fc_{secrets.token_hex(12)}",
            "call_id": called.id,
            "name": called.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        return [self._at("response.output_item.added", item=dict(item))]

    def _close(self) -> list[Json]:
        """The item that grows is complete."""
        if not self._items or self._items[-1]["status"] == "completed":
            return []
        item = self._items[-1]
        item["status"] = "completed"
        if item["type"] == "message":
            part = item["content"][0]
            done = [
                self._of_item(
                    "response.output_text.done",
                    content_index=0,
                    text=part["text"],
                    logprobs=part["logprobs"],
                ),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
        else:
            done = [
                self._of_item(
                    "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
                )
            ]
        return [*done, self._at("response.output_item.done", item=dict(item))]

    def _end(self, ended: Ended) -> list[Json]:
        self._ended = ended
        self._status = "incomplete" if ended.reason == "length" else "completed"
        return [self._event(f"response.{self._status}", response=self.view())]

    def _usage(self, ended: Ended) -> Json:
        count = len(self._question.request.prompt)
        return {
            "input_tokens": count,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": ended.token_count,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": count + ended.token_count,
        }

    # ------------------------------------------------------------ events

    def _of_item(self, kind: str, **fields: object) -> Json:
        return self._at(kind, item_id=self._items[-1]["id"], **fields)

    def _at(self, kind: str, **fields: object) -> Json:
        return self._event(kind, output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: object) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _plain(value: object) -> Any:  # noqa: ANN401 - JSON
    return msgspec.to_builtins(value)
