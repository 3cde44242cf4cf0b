"""What clients send, as typed values. What we do not know is left aside; what has a wrong type is refused.

The structs say what a value may be; the functions here say in one sentence what was wrong.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson
from aiohttp import web
from msgspec import Meta, Struct

from shared.protocol import Sampling
from web.openai.errors import bad_request

Kind = TypeVar("Kind")

MAX_STOPS = 4

Temperature = Annotated[float, Meta(ge=0, le=100)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-100, le=100)]
TokenCount = Annotated[int, Meta(ge=1)]
StopString = Annotated[str, Meta(max_length=1000)]


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class SwarmOptions(Struct, frozen=True):
    """Our own extension."""

    route: bool = False
    """Tell every token's hops, and every change of route."""


class SamplingRequest(Struct, frozen=True, kw_only=True):
    """The fields by which a client says how tokens are drawn; all of them may be absent or null."""

    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: int | None = None
    min_p: Fraction | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None


class Part(Struct, frozen=True):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Message(Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(SamplingRequest, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    n: TokenCount | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    response_format: dict[str, Any] | None = None
    swarm: SwarmOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_route(self) -> bool:
        return self.swarm is not None and self.swarm.route

    @property
    def wants_usage(self) -> bool:
        """In a stream; other answers always carry it."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


# ---------------------------------------------------------------- reading


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; raises ApiError for anything else."""
    body = await request.read()
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("the body is not a JSON object")
    return value


def read_chat(body: dict[str, Any]) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """A chat request, and its messages in the form that chat templates take. Raises ApiError."""
    request = read_struct(body, ChatRequest)
    if request.n is not None and request.n > 1:
        raise bad_request("n: only one answer at a time is given; leave n out and ask again for another", "n")
    return request, [_read_message(message, index) for index, message in enumerate(request.messages)]


def read_struct(value: object, kind: type[Kind]) -> Kind:
    """Raises ApiError whose `param` names the field that is wrong."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        # msgspec writes: what is wrong - at `$.field[0].other`
        reason, _, place = str(error).partition(" - at `$")
        param = place.rstrip("`").lstrip(".") or _missing_field(reason)
        raise bad_request(f"{param}: {reason}" if param else reason, param or None) from None


def _missing_field(reason: str) -> str:
    """A missing field is named in the sentence only."""
    found = re.search(r"missing required field `(\w+)`", reason)
    return found[1] if found else ""


def _read_message(message: Message, index: int) -> dict[str, Any]:
    content = _read_content(message, f"messages[{index}].content")
    read: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        read["name"] = message.name
    if message.tool_calls:
        read["tool_calls"] = [_with_parsed_arguments(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        read["tool_call_id"] = message.tool_call_id
    return read


def _read_content(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant":
            return ""  # an answer that was only tool calls
        raise bad_request(f"{where}: a {message.role} message needs content", where)
    return "\n".join(_read_part(part, where) for part in message.content)


def _read_part(part: Part, where: str) -> str:
    if part.type != "text" or part.text is None:
        raise bad_request(f"{where}: only parts of type text are read, not {part.type[:50]!r}", where)
    return part.text


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Clients send a call's arguments as JSON text; chat templates expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = orjson.loads(function["arguments"])
    except orjson.JSONDecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


# ---------------------------------------------------------------- sampling


def sampling_of(request: SamplingRequest, default: Sampling) -> Sampling:
    """The client's wishes over those of the model's makers. Without a seed every answer is another one."""

    def wish(value: float | None, otherwise: float) -> float:
        return otherwise if value is None else value

    return Sampling(
        temperature=wish(request.temperature, default.temperature),
        top_p=max(wish(request.top_p, default.top_p), _SMALLEST_TOP_P),
        top_k=min(max(0, default.top_k if request.top_k is None else request.top_k), _LARGEST_TOP_K),
        min_p=wish(request.min_p, default.min_p),
        seed=secrets.randbits(63) if request.seed is None else _as_int64(request.seed),
        repetition_penalty=wish(request.repetition_penalty, default.repetition_penalty),
        presence_penalty=wish(request.presence_penalty, default.presence_penalty),
        frequency_penalty=wish(request.frequency_penalty, default.frequency_penalty),
    )


_SMALLEST_TOP_P = 1e-6
"""OpenAI takes top_p 0 and keeps the likeliest token; so does this."""


_LARGEST_TOP_K = 1 << 31
"""More than any vocabulary has; some clients send -1 for all."""


def _as_int64(seed: int) -> int:
    """Any whole number is a seed; those outside the wire's range wrap around."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
