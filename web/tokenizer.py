"""One model's tokenizer and chat template, loaded from the files that its peers hand out.

The files come from strangers: only names that tokenizers use are read, no code that they mention is run, and
chat templates run in transformers' sandbox. Loading and rendering take a while, so call them in a thread.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shared.errors import CorollaError, ProtocolError
from shared.protocol import Sampling
from web.call_forms import MARKS, CallForm, form_of

log = logging.getLogger(__name__)

Kind = TypeVar("Kind")

READ = frozenset({
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
})  # fmt: skip
"""The files that are looked at; whatever else a peer hands out is left alone."""

MAX_STOP_TOKENS = 64
"""As many as an `Open` may carry."""
USER_TURN = "\nUser:"


class ChatRefused(CorollaError):
    """The model's chat template does not take this conversation."""


class Rendered(msgspec.Struct, frozen=True):
    """A conversation as the model reads it."""

    tokens: list[int]
    stops: list[str]
    """Where an answer ends, beyond what the asker wants and the stop tokens."""


class ModelTokenizer:
    """Text to tokens and back, and conversations to prompts, for one model. Threads may share it."""

    def __init__(self, tokenizer: Any, config: _Config, generation: _GenerationConfig) -> None:  # noqa: ANN401
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # Unlike its wrapper, the backend alone never changes while it is used; so threads may share it.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._template: str | None = _template_source(tokenizer)
        self._special = frozenset(
            token for token, added in self._backend.get_added_tokens_decoder().items() if added.special
        )
        self.call_form: CallForm | None = form_of(self._template) if self.takes_tools else None
        """How the chat template teaches the model to call tools; None when in no form that we read."""
        self.stop_tokens = _stop_tokens(tokenizer, config, generation)
        self.sampling = generation.sampling()
        """How the model's makers want it sampled; temperature 1 when they do not say."""

        self._kept = _special_marks(tokenizer)
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])
        self.vocab_size = max(config.vocab_size or 0, self._backend.get_vocab_size())
        """Token ids are below it."""
        self.longest_token = max(map(len, self._backend.get_vocab()), default=1)
        """Characters; so many times the context is more text than fits in any case."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids; with `special`, also the marks that this model wants around a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._backend.decode(tokens, skip_special_tokens=True)
        return text

    def decode_with_calls(self, tokens: Sequence[int]) -> str:
        """As `decode`, but the marks around calls of tools stay, though they may be special tokens."""
        parts: list[str] = []
        start = 0
        for place, token in enumerate(tokens):
            if token in self._kept:
                parts += (self.decode(tokens[start:place]), self._kept[token])
                start = place + 1
        return "".join([*parts, self.decode(tokens[start:])])

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text, which may be part of a character; nothing for special tokens."""
        name: str | None = self._backend.id_to_token(token)
        if name is None or token in self._special:
            return b""
        if self._byte_level and all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        if byte := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(byte[1])
        return name.replace("▁", " ").encode()

    def token_name(self, token: int) -> str:
        """A token on its own, for people; special tokens by their name."""
        if token in self._special:
            name: str | None = self._backend.id_to_token(token)
            return name or ""
        return self.token_bytes(token).decode(errors="replace")

    @property
    def takes_tools(self) -> bool:
        """True when the chat template has a place for tools."""
        return self._template is not None and "tools" in self._template

    @property
    def chat_template(self) -> str | None:
        return self._template

    def special_names(self) -> dict[str, str | None]:
        """The tokens that begin, end and fill texts, by their names in a tokenizer's configuration."""
        return {name: getattr(self._tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        opening: str = "",
        *,
        goes_on: bool = False,
    ) -> Rendered:
        """The prompt for the assistant's next answer, which begins with the `opening`.

        With `goes_on` the last message is the beginning of an answer, which is not over.

        Raises ChatRefused with the template's reason.
        """
        if self._template is None:
            script = _plain(messages[:-1]) + " " + messages[-1]["content"] if goes_on else _plain(messages)
            return Rendered(self.encode(script + opening, special=True), [USER_TURN])
        if "developer" not in self._template:
            messages = [_as_system(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools and self.takes_tools else None,
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
            )
        except Exception as error:  # the template is foreign code: whatever it raises is its refusal
            raise ChatRefused(f"the model's chat template refuses this conversation: {error}") from None
        return Rendered(self.encode(text + opening), [])


def preload() -> None:
    """Import what loading needs, so that the first chat does not wait for it; call it in a thread."""
    import transformers

    _ = transformers.AutoTokenizer  # transformers imports its parts when they are first touched


def load_tokenizer(files: Mapping[str, bytes]) -> ModelTokenizer:
    """Make a tokenizer of a peer's files. Raises ProtocolError when they cannot be used."""
    # Here and not above: the import takes seconds, and the page should be up before them.
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory(prefix="corolla-tokenizer-") as folder:
            _lay_out(Path(folder), files)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return ModelTokenizer(
            tokenizer,
            _read_config(files.get("config.json"), _Config),
            _read_config(files.get("generation_config.json"), _GenerationConfig),
        )
    except Exception as error:  # foreign files can break a library in any way
        raise ProtocolError(f"the tokenizer files of the peers cannot be used: {error}") from None


def _lay_out(folder: Path, files: Mapping[str, bytes]) -> None:
    for name in sorted(READ & files.keys()):
        content = files[name]
        if name in ("config.json", "tokenizer_config.json"):
            content = _without_code(content)
        (folder / name).write_bytes(content)


def _without_code(content: bytes) -> bytes:
    """`auto_map` names classes in files of the repository; with it transformers refuses to load at all."""
    try:
        config = json.loads(content)
    except ValueError:
        return content
    if isinstance(config, dict):
        config.pop("auto_map", None)
    return json.dumps(config).encode()


# ---------------------------------------------------------------- templates


def _template_source(tokenizer: Any) -> str | None:  # noqa: ANN401
    """All of the chat template's text, to see what it knows of; None when there is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return "\n".join(template.values()) if "default" in template else None
    return template or None


def _special_marks(tokenizer: Any) -> dict[int, str]:  # noqa: ANN401
    """The marks around calls of tools, where they are special tokens."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token: mark.content for token, mark in added.items() if mark.special and mark.content in MARKS}


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers since GPT-2 write for bytes: printable ones for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _as_system(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """For models that were never taught to chat: a script that they continue."""
    turns = [f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages]
    return "\n".join([*turns, "Assistant:"])


# ---------------------------------------------------------------- configurations


class _Ends(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


class _Config(_Ends, frozen=True):
    """What we want of a model's config.json."""

    vocab_size: int | None = None

    text_config: _Ends | None = None
    """Models that also see or hear keep it here."""


class _GenerationConfig(_Ends, frozen=True):
    """What we want of a generation_config.json."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampling(self) -> Sampling:
        """The makers' wishes; without any, OpenAI's default of temperature 1."""
        wishes: dict[str, float] = {"temperature": 0.0 if self.do_sample is False else 1.0}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            if (value := getattr(self, name)) is not None:
                wishes[name] = value
        try:
            return msgspec.convert(wishes, Sampling)
        except msgspec.ValidationError as error:
            log.warning("a generation_config.json is not followed: %s", error)
            return Sampling(temperature=1.0)


def _read_config(content: bytes | None, kind: type[Kind]) -> Kind:
    """These files only refine what happens, so one that makes no sense counts as absent."""
    try:
        return msgspec.json.decode(content, type=kind) if content is not None else kind()
    except msgspec.DecodeError as error:
        log.warning("a configuration of a model is not as expected: %s", error)
        return kind()


def _stop_tokens(tokenizer: Any, config: _Config, generation: _GenerationConfig) -> list[int]:  # noqa: ANN401
    """Every token that any of the files calls an end."""
    text_config = config.text_config or _Ends()
    found: dict[int, None] = {}
    for end in (
        tokenizer.eos_token_id,
        generation.eos_token_id,
        config.eos_token_id,
        text_config.eos_token_id,
    ):
        for token in end if isinstance(end, list) else [end]:
            if token is not None and token >= 0:
                found[token] = None
    return list(found)[:MAX_STOP_TOKENS]
