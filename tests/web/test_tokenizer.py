"""A model's tokenizer and chat template, from files that strangers handed out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import orjson
import pytest

from shared.errors import ProtocolError
from shared.protocol import Sampling
from tests.harness.tokenizers import ASSISTANT, END, byte_fallback, byte_level, chat_files
from web.tokenizer import ChatRefused, ModelTokenizer, load_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def chatty() -> ModelTokenizer:
    return load_tokenizer(chat_files())


def written(tokenizer: ModelTokenizer, messages: list[dict[str, str]]) -> str:
    """The prompt with its special tokens."""
    text: str = byte_level().decode(tokenizer.render(messages).tokens, skip_special_tokens=False)
    return text


def test_the_chat_template_makes_the_prompt(chatty: ModelTokenizer) -> None:
    assert written(chatty, HELLO) == f"<|begin|><|user|>Hello{END}{ASSISTANT}"


def test_decoding_leaves_special_tokens_out(chatty: ModelTokenizer) -> None:
    assert chatty.decode(chatty.render(HELLO).tokens) == "Hello"


def test_a_developer_is_a_system_to_templates_that_know_no_developer(chatty: ModelTokenizer) -> None:
    prompt = written(chatty, [{"role": "developer", "content": "Be brief."}, *HELLO])
    assert prompt.startswith("<|begin|><|system|>Be brief.")


def test_the_reason_of_a_template_that_refuses_is_told(chatty: ModelTokenizer) -> None:
    with pytest.raises(ChatRefused, match="a tool must say which call it answers"):
        chatty.render([{"role": "tool", "content": "sunny"}])


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ChatRefused):
        load_tokenizer(chat_files(template=escape)).render(HELLO)


def test_tools_are_rendered_when_the_template_knows_them(chatty: ModelTokenizer) -> None:
    assert chatty.takes_tools
    assert "weather" in chatty.decode(chatty.render(HELLO, [TOOL]).tokens)


def test_tools_are_left_out_when_the_template_knows_none() -> None:
    plain = load_tokenizer(chat_files(template="{{ messages[0].content }}"))
    assert not plain.takes_tools
    assert plain.decode(plain.render(HELLO, [TOOL]).tokens) == "Hello"


def test_a_model_without_a_template_continues_a_script() -> None:
    rendered = load_tokenizer(chat_files(template=None)).render(
        [
            {"role": "system", "content": "Be brief."},
            *HELLO,
        ]
    )
    assert byte_level().decode(rendered.tokens) == "System: Be brief.\nUser: Hello\nAssistant:"
    assert rendered.stops == ["\nUser:"]


def test_a_tokenizer_with_byte_fallback_works_too() -> None:
    tokenizer = load_tokenizer(chat_files(byte_fallback(), template="{{ messages[0].content }}"))
    assert tokenizer.decode(tokenizer.render([{"role": "user", "content": "héé 😀"}]).tokens) == "héé 😀"


def test_stop_tokens_are_gathered_from_every_file() -> None:
    files = chat_files(
        generation={"eos_token_id": [7, 8]},
        config={"model_type": "llama", "eos_token_id": 8, "text_config": {"eos_token_id": 9}},
    )
    assert load_tokenizer(files).stop_tokens == [byte_level().token_to_id(END), 7, 8, 9]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, Sampling(temperature=1.0)),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, Sampling(temperature=0.6, top_k=20, top_p=0.95)),
        ({"do_sample": False}, Sampling(temperature=0.0)),
        ({"temperature": -1}, Sampling(temperature=1.0)),
        ({"temperature": "warm"}, Sampling(temperature=1.0)),
    ],
)
def test_the_makers_say_how_to_sample(generation: dict[str, object], expected: Sampling) -> None:
    assert load_tokenizer(chat_files(generation=generation)).sampling == expected


def test_no_code_that_the_files_name_is_run() -> None:
    files = chat_files()
    settings = orjson.loads(files["tokenizer_config.json"])
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    files["tokenizer_config.json"] = orjson.dumps(settings)
    files["evil.py"] = b"raise SystemExit('ran')"
    assert load_tokenizer(files).decode([]) == ""


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": b"{"},
        {"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"},
        {**chat_files(), "tokenizer.json": b"\x00\xff"},
        {**chat_files(), "tokenizer_config.json": b"nonsense"},
        {**chat_files(), "chat_template.jinja": b"\xff\xfe"},
    ],
)
def test_files_that_are_no_tokenizer_are_told_in_one_sentence(files: dict[str, bytes]) -> None:
    with pytest.raises(ProtocolError, match="the tokenizer files of the peers cannot be used"):
        load_tokenizer(files)


def test_threads_share_a_tokenizer(chatty: ModelTokenizer) -> None:
    def use(number: int) -> bool:
        text = f"petal number {number}"
        return chatty.decode(chatty.encode(text)) == text and bool(chatty.render(HELLO).tokens)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(400)))
