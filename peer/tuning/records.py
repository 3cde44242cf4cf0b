"""What a model is to learn from: lines of JSON, checked before anything is trained, and made into tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta, Struct

from shared.errors import SettingsError

IGNORED = -100
"""What transformers calls a label that counts for nothing."""
Words = Annotated[str, Meta(min_length=1)]


class Said(Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Words


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """One line: a chat, of which the assistant's words are learnt, or a text that is learnt whole."""

    messages: Annotated[list[Said], Meta(min_length=1)] | None = None
    text: Words | None = None


@dataclass(frozen=True)
class Example:
    """Tokens, and for each whether it is to be learnt."""

    ids: list[int]
    learnt: list[bool]


def read_records(path: Path) -> list[Record]:
    """Every record of a file. Raises SettingsError with line and field of the first that is malformed."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    records = [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise SettingsError(f"{path} holds no record: write one JSON object a line")
    return records


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = msgspec.json.decode(line, type=Record)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        field = where.rstrip("`") or "the record"
        raise SettingsError(f"{path}, line {number}, {field}: {what[0].lower()}{what[1:]}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise SettingsError(f"{path}, line {number}: it is not JSON ({error})") from None
    if (record.messages is None) == (record.text is None):
        raise SettingsError(f"{path}, line {number}: a record has either messages or text")
    if record.messages and not any(said.role == "assistant" for said in record.messages):
        raise SettingsError(f"{path}, line {number}, messages: no message is the assistant's")
    return record


def examples(records: Sequence[Record], tokenizer: Any, longest: int) -> list[Example]:  # noqa: ANN401
    """Records as tokens, cut to `longest`. Raises SettingsError when nothing would be left to learn."""
    made = [_example(record, tokenizer) for record in records]
    cut = [Example(one.ids[:longest], one.learnt[:longest]) for one in made]
    kept = [one for one in cut if any(one.learnt[1:])]
    if not kept:
        raise SettingsError(f"no record has anything to learn in its first {longest} tokens; raise --length")
    return kept


def _example(record: Record, tokenizer: Any) -> Example:  # noqa: ANN401
    if record.text is not None:
        ids = list(tokenizer(record.text)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return Example(ids, [True] * len(ids))
    assert record.messages is not None
    if tokenizer.chat_template is None:
        raise SettingsError("this model has no chat template: write the records as text")
    chat = [{"role": said.role, "content": said.content} for said in record.messages]
    ids = _templated(tokenizer, chat, asked=False)
    learnt = [False] * len(ids)
    for index, said in enumerate(record.messages):
        if said.role == "assistant":
            start = len(_templated(tokenizer, chat[:index], asked=True))
            end = len(_templated(tokenizer, chat[: index + 1], asked=False))
            learnt[start:end] = [True] * (min(end, len(ids)) - start)
    return Example(ids, learnt)


def _templated(tokenizer: Any, chat: list[dict[str, str]], *, asked: bool) -> list[int]:  # noqa: ANN401
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=asked, return_dict=True)["input_ids"]
    return [int(token) for token in ids]


def batch_of(chosen: Sequence[Example], blank: int) -> dict[str, torch.Tensor]:
    """Examples side by side, the shorter ones filled up behind."""
    length = max(len(one.ids) for one in chosen)
    ids = [one.ids + [blank] * (length - len(one.ids)) for one in chosen]
    labels = [
        [token if learnt else IGNORED for token, learnt in zip(one.ids, one.learnt, strict=True)]
        + [IGNORED] * (length - len(one.ids))
        for one in chosen
    ]
    mask = [[1] * len(one.ids) + [0] * (length - len(one.ids)) for one in chosen]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def order(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Which examples each step takes, for ever: all of them once, in another order each time around."""
    size = min(size, count)
    for around in range(1 << 30):
        shuffled = list(range(count))
        random.Random(f"{seed}-{around}").shuffle(shuffled)
        for start in range(0, count - size + 1, size):
            yield shuffled[start : start + size]
