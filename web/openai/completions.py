"""POST /v1/completions: texts or tokens in, how they go on out; with `echo`, how likely they were."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, assert_never

import msgspec
import orjson
from aiohttp import web

from shared.client.session import Request, Rerouted
from shared.protocol import Likelihood
from web.access import user_of
from web.chat import AnswerEvent, Ended, PromptScored, Said
from web.line import Waiting
from web.logprobs import TokenText, token_texts
from web.openai.asking import Asker, Question, check_length, room_for, timings_view, usage_view
from web.openai.chat import fingerprint
from web.openai.errors import bad_request
from web.openai.requests import MAX_PROMPTS, CompletionRequest, read_json, read_struct, sampling_of
from web.openai.streaming import Teller, stream_answer
from web.tokenizer import ModelTokenizer

Json = dict[str, Any]

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, when the client names no limit."""


class Completions:
    """The one handler, and what it works with."""

    def __init__(self, asker: Asker, keepalive_s: float) -> None:
        self._asker = asker
        self._keepalive_s = keepalive_s

    async def post(self, http: web.Request) -> web.StreamResponse:
        asked = read_struct(await read_json(http), CompletionRequest)
        reply = _Reply(asked, await self._questions(asked, user_of(http)))
        async with aclosing(self._events(reply)) as events:
            if asked.stream:
                chunks = _Chunks(self._asker, reply)
                return await stream_answer(http, events, chunks, keepalive_s=self._keepalive_s)
            choices = [_Choice() for _ in range(reply.choice_count)]
            async for place, event in events:
                choices[place].take(reply, place, event)
            return web.json_response(body=orjson.dumps(reply.whole(choices)))

    # ------------------------------------------------------------ asking

    async def _questions(self, asked: CompletionRequest, user: str) -> list[_Prompt]:
        if asked.suffix:
            raise bad_request("suffix: text is continued, not filled in; leave suffix out", "suffix")
        model, tokenizer = await self._asker.served(asked.model)
        texts = _prompts(asked.prompt)
        if len(texts) * (asked.n or 1) > MAX_PROMPTS:
            raise bad_request(f"prompt: at most {MAX_PROMPTS} answers are given to one request", "prompt")
        check_length(model, tokenizer, (text for text in texts if isinstance(text, str)), "prompt")
        scores = bool(asked.echo) and asked.logprobs is not None
        sampling = sampling_of(
            asked, tokenizer.sampling, likelihoods=asked.logprobs, prompt_likelihoods=scores
        )
        wanted = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
        prompts = []
        for text in texts:
            tokens = _tokens(text, tokenizer)
            request = Request(
                artefact=model.artefact,
                adapter=model.adapter,
                prompt=tokens,
                # A swarm draws at least one token; when none is wanted, it is not told.
                max_new_tokens=room_for(model, len(tokens), max(wanted, 1), "prompt"),
                sampling=sampling,
                stop_tokens=tokenizer.stop_tokens,
            )
            question = Question(
                user=user, model=model, tokenizer=tokenizer, request=request, stops=asked.stops
            )
            shown = text if isinstance(text, str) else tokenizer.decode(tokens)
            prompts.append(_Prompt(question, shown))
        return prompts

    async def _events(self, reply: _Reply) -> AsyncGenerator[tuple[int, AnswerEvent], None]:
        """All answers to all prompts, one after another."""
        for place in range(reply.choice_count):
            prompt, choice = reply.prompt(place), place % reply.answers
            async with aclosing(self._asker.answer(prompt.question, choice)) as events:
                async for event in events:
                    yield place, event


# ---------------------------------------------------------------- prompts


class _Prompt(msgspec.Struct, frozen=True):
    """A prompt that is ready to be asked, and its text."""

    question: Question
    text: str


def _prompts(prompt: str | list[str | int | list[int]]) -> Sequence[str | list[int]]:
    """One or several, each as text or as tokens. Raises ApiError for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    tokens = [each for each in prompt if isinstance(each, int)]
    if tokens and len(tokens) < len(prompt):
        raise bad_request("prompt: it is either one list of token ids or a list of prompts", "prompt")
    return [tokens] if tokens else [each for each in prompt if not isinstance(each, int)]


def _tokens(text: str | list[int], tokenizer: ModelTokenizer) -> list[int]:
    tokens = tokenizer.encode(text, special=True) if isinstance(text, str) else text
    if not tokens:
        raise bad_request("prompt: it is empty, and a text needs a beginning", "prompt")
    if max(tokens) >= tokenizer.vocab_size:
        raise bad_request(f"prompt: token ids are below {tokenizer.vocab_size} in this model", "prompt")
    return tokens


# ---------------------------------------------------------------- answering


class _Choice:
    """One answer: what is not told yet of it, and how it ended."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.tokens: list[tuple[TokenText, bool]] = []
        """With true for the very first token of a prompt, after which nothing can be likely."""
        self.offset = 0
        self.ended: Ended | None = None
        self.count = 0
        self._begun = False

    def take(self, reply: _Reply, place: int, event: AnswerEvent) -> None:
        if not isinstance(event, Rerouted | Waiting):
            self._begin(reply, place, event)
        match event:
            case Said() if reply.asked.max_tokens != 0:
                self.text.append(event.text)
                self.tokens += [(text, False) for text in event.texts]
            case Ended():
                self.ended = event
                self.count = 0 if reply.asked.max_tokens == 0 else event.token_count
                if event.last is not None and reply.asked.max_tokens != 0:
                    self.tokens.append((TokenText("", b"", event.last), False))
            case _:
                pass

    def _begin(self, reply: _Reply, place: int, event: AnswerEvent) -> None:
        """With `echo` the prompt comes first."""
        if self._begun or not reply.asked.echo:
            return
        self._begun = True
        prompt = reply.prompt(place)
        self.text.append(prompt.text)
        if reply.asked.logprobs is not None:
            scored = event.likelihoods if isinstance(event, PromptScored) else ()
            first = Likelihood(prompt.question.request.prompt[0], 0.0)
            texts = token_texts([first, *scored], prompt.question.tokenizer.token_bytes)
            self.tokens += [(text, index == 0) for index, text in enumerate(texts)]

    def clear(self) -> None:
        self.text, self.tokens = [], []


class _Reply:
    """The objects of one reply: all of them carry the same id, time, model and fingerprint."""

    def __init__(self, asked: CompletionRequest, prompts: list[_Prompt]) -> None:
        self.asked = asked
        self.answers = asked.n or 1
        self._prompts = prompts
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    @property
    def choice_count(self) -> int:
        return len(self._prompts) * self.answers

    def prompt(self, place: int) -> _Prompt:
        return self._prompts[place // self.answers]

    def whole(self, choices: list[_Choice]) -> Json:
        views = [self._choice(place, choice) for place, choice in enumerate(choices)]
        return {**self._head(), "choices": views, **self._end(choices)}

    def chunk(self, place: int, choice: _Choice, swarm: Json | None) -> Json:
        """What has come of a choice since its last chunk."""
        chunk = {**self._head(), "choices": [self._choice(place, choice)]}
        choice.clear()
        if self.asked.wants_usage:
            chunk["usage"] = None
        if swarm is not None:
            chunk["swarm"] = swarm
        return chunk

    def usage_chunk(self, choices: list[_Choice]) -> Json:
        return {**self._head(), "choices": [], **self._end(choices)}

    def _choice(self, place: int, choice: _Choice) -> Json:
        logprobs = None if self.asked.logprobs is None else self._logprobs(place, choice)
        reason = None
        if choice.ended is not None:
            reason = "length" if self.asked.max_tokens == 0 else choice.ended.reason
        return {
            "index": place,
            "text": "".join(choice.text),
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def _logprobs(self, place: int, choice: _Choice) -> Json:
        """Four lists of one length, as OpenAI told it before there were chats."""
        tokenizer = self.prompt(place).question.tokenizer
        offsets = []
        for text, _ in choice.tokens:
            offsets.append(choice.offset)
            choice.offset += len(text.text)
        return {
            "tokens": [text.text or tokenizer.token_name(text.likelihood.token) for text, _ in choice.tokens],
            "token_logprobs": [None if first else text.likelihood.logprob for text, first in choice.tokens],
            "top_logprobs": [
                None if first else _by_text(text.likelihood, tokenizer) for text, first in choice.tokens
            ],
            "text_offset": offsets,
        }

    def _head(self) -> Json:
        question = self._prompts[0].question
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": question.model.name,
            "system_fingerprint": fingerprint(question),
        }

    def _end(self, choices: list[_Choice]) -> Json:
        prompt = sum(len(prompt.question.request.prompt) for prompt in self._prompts)
        ended = choices[-1].ended
        assert ended is not None
        last = len(self._prompts[-1].question.request.prompt)
        return {
            "usage": usage_view(prompt, sum(choice.count for choice in choices)),
            "timings": timings_view(last, ended),
        }


class _Chunks(Teller[tuple[int, AnswerEvent]]):
    """A reply as a stream of chunks."""

    last = b"[DONE]"

    def __init__(self, asker: Asker, reply: _Reply) -> None:
        self._asker = asker
        self._reply = reply
        self._choices = [_Choice() for _ in range(reply.choice_count)]

    def begin(self) -> list[Json]:
        return []

    def take(self, event: tuple[int, AnswerEvent]) -> list[Json]:
        place, happened = event
        choice = self._choices[place]
        choice.take(self._reply, place, happened)
        swarm = self._swarm_view(happened)
        # What is told of the prompt waits for the first text or the end, as it comes with them.
        if swarm is None and isinstance(happened, PromptScored | Rerouted | Waiting):
            return []
        return [self._reply.chunk(place, choice, swarm)]

    def end(self) -> list[Json]:
        return [self._reply.usage_chunk(self._choices)] if self._reply.asked.wants_usage else []

    def _swarm_view(self, event: AnswerEvent) -> Json | None:
        if not self._reply.asked.wants_route:
            return None
        match event:
            case Waiting():
                return {"waiting": event.place}
            case Rerouted():
                return {"event": self._asker.reroute_view(event)}
            case Said() | Ended():
                return {"tokens": self._asker.tokens_view(event.tokens)}
            case PromptScored():
                return None
            case _:
                assert_never(event)


def _by_text(likelihood: Likelihood, tokenizer: ModelTokenizer) -> dict[str, float]:
    """The likeliest tokens and the one that came; of several with the same text, the likeliest counts."""
    by_text: dict[str, float] = {}
    for token, logprob in [*likelihood.top, (likelihood.token, likelihood.logprob)]:
        by_text.setdefault(tokenizer.token_name(token), logprob)
    return by_text
