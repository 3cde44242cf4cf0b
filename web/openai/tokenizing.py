"""POST /tokenize and /detokenize, GET /tokenizer_info: a model's tokenizer from afar, in the words of vLLM.

lm-eval asks for these when it has no tokenizer of its own.
"""

from __future__ import annotations

import asyncio

import orjson
from aiohttp import web
from msgspec import Struct

from shared.client.directory import ServedModel
from web.openai.asking import Asker, check_length
from web.openai.errors import bad_request
from web.openai.requests import Message, Token, read_json, read_messages, read_struct
from web.tokenizer import ModelTokenizer


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """A text, or a conversation as the model would read it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[Token]


class Tokenizing:
    """The three handlers."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    async def tokenize(self, http: web.Request) -> web.Response:
        asked = read_struct(await read_json(http), TokenizeRequest)
        model, tokenizer = await self._served(asked.model)
        if asked.messages is not None:
            messages = read_messages(asked.messages)
            check_length(model, tokenizer, (message["content"] for message in messages), "messages")
            tokens = (await asyncio.to_thread(tokenizer.render, messages)).tokens
        elif asked.prompt is not None:
            check_length(model, tokenizer, [asked.prompt], "prompt")
            tokens = await asyncio.to_thread(tokenizer.encode, asked.prompt, special=asked.add_special_tokens)
        else:
            raise bad_request("prompt: give a prompt or messages", "prompt")
        view = {"tokens": tokens, "count": len(tokens), "max_model_len": model.context_length}
        return web.json_response(body=orjson.dumps(view))

    async def detokenize(self, http: web.Request) -> web.Response:
        asked = read_struct(await read_json(http), DetokenizeRequest)
        _, tokenizer = await self._served(asked.model)
        if max(asked.tokens, default=0) >= tokenizer.vocab_size:
            raise bad_request(f"tokens: ids are below {tokenizer.vocab_size} in this model", "tokens")
        return web.json_response(body=orjson.dumps({"prompt": tokenizer.decode(asked.tokens)}))

    async def info(self, http: web.Request) -> web.Response:
        model, tokenizer = await self._served(http.query.get("model"))
        view = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.context_length,
            "vocab_size": tokenizer.vocab_size,
            "chat_template": tokenizer.chat_template,
            **tokenizer.special_names(),
        }
        return web.json_response(body=orjson.dumps(view))

    async def _served(self, name: str | None) -> tuple[ServedModel, ModelTokenizer]:
        """The model that is named, or the only one there is."""
        if name is None:
            names = self._asker.models.names()
            if len(names) != 1:
                raise bad_request("model: say which, as there is not just one here", "model")
            name = names[0]
        return await self._asker.served(name)
