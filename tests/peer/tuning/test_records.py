"""Records are checked before anything is trained, and only what is to be learnt is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from peer.settings import DEMO_MODEL
from peer.tuning.records import IGNORED, batch_of, examples, order, read_records
from shared.errors import SettingsError

CHAT = {
    "messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A swarm."}]
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:  # noqa: ANN401
    auto: Any = AutoTokenizer
    return auto.from_pretrained(DEMO_MODEL)


def written(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: it is not JSON"),
        ({"text": 5}, "line 2, text: expected"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "pirate", "content": "b"}]},
            "line 2, messages",
        ),
        ({"messages": [{"role": "user"}]}, r"line 2, messages\[0\]: object missing required field `content`"),
        ({"text": "a", "mesages": []}, "line 2, the record: object contains unknown field `mesages`"),
        ({}, "line 2: a record has either messages or text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2, messages: no message is the assistant's"),
        ({"text": ""}, "line 2, text: expected"),
    ],
)
def test_the_first_malformed_line_is_named_with_its_field(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_records(written(tmp_path, CHAT, line, {"text": 7}))


def test_a_file_that_is_not_there_or_empty_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(SettingsError, match="holds no record"):
        read_records(written(tmp_path, "", "  "))


def test_of_a_chat_the_assistant_s_words_are_learnt(tmp_path: Path, tokenizer: Any) -> None:  # noqa: ANN401
    chat = {
        "messages": [
            *CHAT["messages"],
            {"role": "user", "content": "Yes?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    [example] = examples(read_records(written(tmp_path, chat)), tokenizer, 500)

    learnt = [token for token, mine in zip(example.ids, example.learnt, strict=True) if mine]
    text = tokenizer.decode(learnt, skip_special_tokens=True)
    assert text.replace(" ", "").replace("\n", "") == "Aswarm.Yes."
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(chat["messages"], tokenize=False)


def test_a_batch_counts_only_what_is_learnt(tmp_path: Path, tokenizer: Any) -> None:  # noqa: ANN401
    found = examples(read_records(written(tmp_path, CHAT, {"text": "Hello there"})), tokenizer, 500)
    batch = batch_of(found, tokenizer.pad_token_id)

    for row, example in enumerate(found):
        kept = batch["labels"][row] != IGNORED
        assert kept.sum() == sum(example.learnt)
        assert (batch["labels"][row][kept] == batch["input_ids"][row][kept]).all()
        assert batch["attention_mask"][row].sum() == len(example.ids)


def test_every_example_comes_once_each_time_around() -> None:
    steps = order(10, 3, seed=1)
    first = [next(steps) for _ in range(3)]

    assert len({index for chosen in first for index in chosen}) == 9
    again = order(10, 3, seed=1)
    assert [next(again) for _ in range(3)] == first
