"""What clients send, as typed values. What we do not know is left aside; what has a wrong type is refused.

The structs say what a value may be; the functions here say in one sentence what was wrong.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson
from aiohttp import web
from msgspec import Meta, Struct

from shared.protocol import MAX_LIKELIEST, Bias, Sampling
from web.openai.errors import bad_request

Kind = TypeVar("Kind")

MAX_STOPS = 4
MAX_CHOICES = 4
"""Answers to one question. They are made one after another, so more would only make clients wait."""
MAX_PROMPTS = 128
"""Of one request for completions, times the answers to each."""

Temperature = Annotated[float, Meta(ge=0, le=100)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-100, le=100)]
TokenCount = Annotated[int, Meta(ge=1)]
Token = Annotated[int, Meta(ge=0, lt=1 << 31)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Biases = Annotated[
    dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=1024),
]
"""Added to the logits of tokens, which are named by their ids."""
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
    logit_bias: Biases | None = None


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


class Function(Struct, frozen=True, kw_only=True):
    """What a model is told of a tool."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Struct, frozen=True, kw_only=True):
    """Something that a model may ask its client to do."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Struct, frozen=True):
    name: str


class NamedTool(Struct, frozen=True):
    """The one tool that is to be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchema(Struct, frozen=True, kw_only=True):
    name: str | None = None
    schema: dict[str, Any] | None = None


class ResponseFormat(Struct, frozen=True, kw_only=True):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class AnswerRequest(SamplingRequest, frozen=True, kw_only=True):
    """What chats and completions have in common."""

    model: Annotated[str, Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    n: Choices | None = None
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


class ChatRequest(AnswerRequest, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LIKELIEST)] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Go on with the assistant's last message, as vLLM calls it, instead of beginning another one."""

    @property
    def goes_on(self) -> bool:
        return bool(self.continue_final_message)

    @property
    def likelihoods(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(AnswerRequest, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str | Token | list[Token]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LIKELIEST)] | None = None
    suffix: str | None = None


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
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs: they come with logprobs, so set logprobs to true", "top_logprobs")
    messages = read_messages(request.messages)
    _check_going_on(request, messages[-1])
    return request, messages


def _check_going_on(request: ChatRequest, last: dict[str, Any]) -> None:
    """Whether an answer can begin where the request wants it to. Raises ApiError."""
    field = "continue_final_message"
    if request.add_generation_prompt is not None and request.add_generation_prompt == request.goes_on:
        raise bad_request(
            "add_generation_prompt: it is false with continue_final_message and true without; leave it out",
            "add_generation_prompt",
        )
    if not request.goes_on:
        return
    if last["role"] != "assistant" or not last["content"].strip() or "tool_calls" in last:
        raise bad_request(
            f"{field}: the last message must be an assistant's, with text to go on from and no tool calls",
            field,
        )
    if request.tool_choice not in (None, "none", "auto"):
        raise bad_request(
            f"{field}: a forced tool begins a message of its own, so leave one of them out", field
        )
    if request.response_format is not None and request.response_format.type != "text":
        raise bad_request(
            f"{field}: half of an answer cannot follow a response_format, so leave it out", field
        )


def read_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """In the form that chat templates take. Raises ApiError."""
    return [_read_message(message, index) for index, message in enumerate(messages)]


def read_struct(value: object, kind: type[Kind]) -> Kind:
    """Raises ApiError whose `param` names the field that is wrong."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        # msgspec writes: what is wrong - at `$.field[0].other`, or: at `key` in `$.field`
        reason, _, place = str(error).replace(" - at `key` in `$", " - at `$").partition(" - at `$")
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


def sampling_of(
    request: SamplingRequest,
    default: Sampling,
    *,
    grammar: str = "",
    likelihoods: int | None = None,
    prompt_likelihoods: bool = False,
) -> Sampling:
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
        logit_bias=[Bias(int(token), add) for token, add in (request.logit_bias or {}).items()],
        grammar=grammar,
        likelihoods=likelihoods,
        prompt_likelihoods=prompt_likelihoods,
    )


def sampling_of_choice(sampling: Sampling, index: int) -> Sampling:
    """Of several answers each has a seed of its own."""
    return msgspec.structs.replace(sampling, seed=_as_int64(sampling.seed + index))


_SMALLEST_TOP_P = 1e-6
"""OpenAI takes top_p 0 and keeps the likeliest token; so does this."""


_LARGEST_TOP_K = 1 << 31
"""More than any vocabulary has; some clients send -1 for all."""


def _as_int64(seed: int) -> int:
    """Any whole number is a seed; those outside the wire's range wrap around."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
