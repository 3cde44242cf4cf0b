"""From what a client asks to what the swarm answers: shared by chats, completions and what adapts to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, assert_never
from urllib.parse import quote

import msgspec

from shared.client.directory import ServedModel
from shared.client.session import Request, Rerouted
from shared.identity import PeerId
from shared.spans import Span
from web.call_forms import HERMES, CallForm, Types, types_of
from web.chat import AnswerEvent, Ended, FinishReason, PromptScored, Said, TokenTrace, answer
from web.line import Waiting, WaitingLines
from web.logprobs import TokenText
from web.openai.errors import ApiError, bad_request
from web.openai.grammar import grammar_of_call, grammar_of_format, grammar_of_schema, parameters_of
from web.openai.models import Models
from web.openai.requests import ChatRequest, NamedTool, Tool, sampling_of, sampling_of_choice
from web.openai.tools import Argued, Called, CallReader, Piece
from web.route_view import reroute_view, tokens_view
from web.swarm import Swarm
from web.tokenizer import ModelTokenizer
from web.tokenizer_cache import TokenizerCache

Json = dict[str, Any]

DEFAULT_MAX_TOKENS = 1024
"""When the client names no limit. Peers reserve memory for all of it: the whole context would be greedy."""


class Forced(msgspec.Struct, frozen=True):
    """A call that the model has to make: the answer begins with `opening` and ends with `closing`.

    What is between follows the grammar. The model reads the opening as its own words, so it goes on in the
    form that it was taught.
    """

    grammar: str = ""
    opening: str = ""
    closing: str = ""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """All that is needed to ask the swarm, once or several times."""

    user: str
    """Who takes turns with others when the swarm is full."""
    model: ServedModel
    tokenizer: ModelTokenizer
    request: Request
    stops: Sequence[str] = ()
    choices: int = 1
    form: CallForm | None = None
    """How calls of tools are written in the answer; None when none are read there."""
    types: Types = {}
    forced: Forced = Forced()
    warnings: Sequence[str] = ()

    @property
    def reads_calls(self) -> bool:
        return self.form is not None

    @property
    def headers(self) -> dict[str, str]:
        """What the client asked for and does not get. Many ask for tools by habit, so nothing is refused."""
        return {"x-swarm-warning": "; ".join(self.warnings)} if self.warnings else {}


ChatEvent = AnswerEvent | Called | Argued


class Asker:
    """Asks the swarm. One for all addresses of the gateway."""

    def __init__(self, swarm: Swarm, lines: WaitingLines, models: Models, tokenizers: TokenizerCache) -> None:
        self.swarm = swarm
        self._lines = lines
        self.models = models
        self._tokenizers = tokenizers

    async def served(self, name: str) -> tuple[ServedModel, ModelTokenizer]:
        """Raises ApiError, NoRoute or ConnectionLost."""
        model = self.models.find(name)
        return model, await self._tokenizers.get(model.artefact)

    async def conversation(self, asked: ChatRequest, messages: list[Json], user: str) -> Question:
        """Raises ApiError when the conversation leaves no room, or asks for what cannot be."""
        model, tokenizer = await self.served(asked.model)
        check_length(model, tokenizer, (message["content"] for message in messages), "messages")
        tools = [] if asked.tool_choice == "none" else asked.tools or []
        forced = await _forced(asked, tools)
        grammar = forced.grammar or await grammar_of_format(asked.response_format)
        told = msgspec.to_builtins(tools)
        prompt = await asyncio.to_thread(
            tokenizer.render, messages, told, forced.opening, goes_on=asked.goes_on
        )
        request = Request(
            artefact=model.artefact,
            adapter=model.adapter,
            prompt=prompt.tokens,
            max_new_tokens=room_for(
                model,
                len(prompt.tokens),
                asked.max_completion_tokens or asked.max_tokens or DEFAULT_MAX_TOKENS,
                "messages",
            ),
            sampling=sampling_of(asked, tokenizer.sampling, grammar=grammar, likelihoods=asked.likelihoods),
            stop_tokens=tokenizer.stop_tokens,
        )
        # A forced call is written in the form of Hermes, whatever the model was taught.
        taught = tokenizer.call_form if tools and not grammar else None
        form = HERMES if forced.opening else taught
        return Question(
            user=user,
            model=model,
            tokenizer=tokenizer,
            request=request,
            stops=[*asked.stops, *prompt.stops],
            choices=asked.n or 1,
            form=form,
            types=types_of(told) if form else {},
            forced=forced,
            warnings=_warnings(asked, tools, tokenizer, reads_calls=form is not None),
        )

    def answer(self, question: Question, choice: int = 0) -> AsyncGenerator[AnswerEvent, None]:
        """One of the answers to a question."""
        request = question.request
        if choice:
            sampling = sampling_of_choice(request.sampling, choice)
            request = msgspec.structs.replace(request, sampling=sampling)
        tokenizer = question.tokenizer
        decode = tokenizer.decode_with_calls if question.reads_calls else tokenizer.decode
        token_bytes = None if request.sampling.likelihoods is None else tokenizer.token_bytes
        return answer(self._lines.generate(question.user, request), decode, question.stops, token_bytes)

    async def choices(self, question: Question) -> AsyncGenerator[tuple[int, ChatEvent], None]:
        """All answers, one after another: what the first computed of the prompt serves the others too."""
        for choice in range(question.choices):
            async with aclosing(self._chat(question, choice)) as events:
                async for event in events:
                    yield choice, event

    async def _chat(self, question: Question, choice: int) -> AsyncGenerator[ChatEvent, None]:
        async with aclosing(self.answer(question, choice)) as events:
            if question.form is None:
                async for event in events:
                    yield event
                return
            reader, forced = CallReader(question.form, question.types), question.forced
            opening = forced.opening
            async for event in events:
                match event:
                    case Said():
                        yield Said("", event.tokens)
                        for piece in reader.push(opening + event.text):
                            yield _as_event(piece)
                        opening = ""
                    case Ended():
                        closing = forced.closing if event.reason == "stop" else ""
                        for piece in [*reader.push(opening + closing), *reader.finish()]:
                            yield _as_event(piece)
                        reason: FinishReason = (
                            "tool_calls" if reader.calls and event.reason == "stop" else event.reason
                        )
                        yield msgspec.structs.replace(event, reason=reason)
                    case PromptScored() | Rerouted() | Waiting():
                        yield event
                    case _:
                        assert_never(event)

    # ------------------------------------------------------------ our extension

    def tokens_view(self, tokens: Sequence[TokenTrace]) -> list[Json]:
        return tokens_view(tokens, self.swarm.directory)

    def reroute_view(self, event: Rerouted) -> Json:
        return reroute_view(event, self.swarm.directory)

    def route_headers(self, ended: Ended, tokens: Sequence[TokenTrace]) -> dict[str, str]:
        """Of a whole answer: the route of its last token, and where the time went."""
        times = f"prompt;dur={ended.first_ms:.1f}, answer;dur={ended.rest_ms:.1f}"
        hops = tokens[-1].hops if tokens else ()
        names = [
            f"{quote(self.swarm.directory.name(PeerId(hop.peer)))}={Span(hop.start, hop.end)}" for hop in hops
        ]
        return {"Server-Timing": times, "x-swarm-route": quote(", ".join(names), safe="=, %-")}


# ---------------------------------------------------------------- asking


def check_length(
    model: ServedModel,
    tokenizer: ModelTokenizer,
    texts: Iterable[str],
    param: str,
) -> None:
    """Refuse at once what cannot fit whatever its tokens are. Raises ApiError."""
    if sum(map(len, texts)) > (model.context_length + 1) * tokenizer.longest_token:
        raise _too_long(model, "more than that", param)


def room_for(model: ServedModel, prompt_tokens: int, wanted: int, param: str) -> int:
    """How many tokens an answer may have. Raises ApiError when there is no room for any."""
    room = model.context_length - prompt_tokens
    if room < 1:
        raise _too_long(model, f"{prompt_tokens}", param)
    return min(wanted, room)


def _too_long(model: ServedModel, taken: str, param: str) -> ApiError:
    return bad_request(
        f"this model's maximum context length is {model.context_length} tokens, but the {param} take {taken}"
        " and leave no room for an answer: shorten them",
        param=param,
        code="context_length_exceeded",
    )


async def _forced(asked: ChatRequest, tools: Sequence[Tool]) -> Forced:
    match asked.tool_choice:
        case NamedTool(function=wanted):
            named = [tool for tool in tools if tool.function.name == wanted.name]
            if not named:
                raise bad_request(
                    f"tool_choice: no tool of this request is named {wanted.name[:100]!r}", "tool_choice"
                )
            grammar = await grammar_of_schema(parameters_of(named[0]), "tools")
            name = msgspec.json.encode(wanted.name).decode()
            opening = f'{HERMES.begins}\n{{"name": {name}, "arguments": '
            return Forced(grammar, opening, f"}}\n{HERMES.ends}")
        case "required":
            if not tools:
                raise bad_request("tool_choice: it is required, but there are no tools", "tool_choice")
            return Forced(await grammar_of_call(tools), f"{HERMES.begins}\n", f"\n{HERMES.ends}")
        case _:
            return Forced()


def _warnings(
    asked: ChatRequest, tools: Sequence[Tool], tokenizer: ModelTokenizer, *, reads_calls: bool
) -> list[str]:
    warnings: list[str] = []
    if tools and not tokenizer.takes_tools:
        warnings.append("this model's chat template knows no tools: they were left out")
    elif tools and tokenizer.call_form is None:
        warnings.append("this model calls tools in a form that is not read here: calls come as text")
    elif tools and not reads_calls:
        warnings.append("with this response_format no tools are called")
    if asked.logprobs and reads_calls:
        warnings.append("logprobs are not given where tools may be called")
    return warnings


def _as_event(piece: Piece) -> ChatEvent:
    return Said(piece, []) if isinstance(piece, str) else piece


# ---------------------------------------------------------------- answering


def usage_view(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def timings_view(prompt_tokens: int, ended: Ended) -> Json:
    """How fast it went, in the words of llama.cpp's server."""
    rest = max(0, ended.token_count - 1)
    return {
        "prompt_n": prompt_tokens,
        "prompt_ms": round(ended.first_ms, 3),
        "prompt_per_second": round(prompt_tokens / max(ended.first_ms, 0.001) * 1000, 3),
        "predicted_n": rest,
        "predicted_ms": round(ended.rest_ms, 3),
        "predicted_per_second": round(rest / max(ended.rest_ms, 0.001) * 1000, 3),
    }


def logprobs_view(texts: Sequence[TokenText], tokenizer: ModelTokenizer) -> Json:
    """How likely the tokens of a chat's answer were, as OpenAI tells it."""
    return {
        "content": [
            {
                "token": each.text,
                "logprob": each.likelihood.logprob,
                "bytes": list(each.raw),
                "top_logprobs": [
                    {
                        "token": tokenizer.token_name(token),
                        "logprob": logprob,
                        "bytes": list(tokenizer.token_bytes(token)),
                    }
                    for token, logprob in each.likelihood.top
                ],
            }
            for each in texts
        ],
        "refusal": None,
    }
