"""Calls of tools as the families write them, and which of the forms a template teaches."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from web.call_forms import FUNCTIONS, HERMES, LLAMA, MISTRAL, CallForm, form_of, types_of
from web.openai.tools import Argued, Called, CallReader

# As the published chat templates of each family tell their models, in a few words.
TAUGHT = [
    ('For each call return <tool_call>\n{\\"name\\": <function-name>}\n</tool_call>', HERMES),
    (
        "<tool_call>\n<function=example>\n<parameter=one>\nvalue\n</parameter>\n</function>\n</tool_call>",
        FUNCTIONS,
    ),
    (
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and value}',
        LLAMA,
    ),
    ("{{- '<|python_tag|>' + tool_call.name + '.call(' }}", LLAMA),
    ('{{- "[TOOL_CALLS][" }}', MISTRAL),
    ("{{ tool_call_tokens }} <｜tool▁calls▁begin｜>", None),
    (None, None),
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "parts": {"type": "array"},
            },
        },
    },
}
TYPES = types_of([WEATHER, {"type": "function", "function": {"name": "time"}}])
KÖLN = {"city": "Köln", "days": 3}
ONE = [("weather", KÖLN)]
TWO = [("weather", KÖLN), ("time", {})]

WRITTEN: list[tuple[CallForm, str, str, list[tuple[str, Any]]]] = [
    (LLAMA, '{"name": "weather", "parameters": {"city": "Köln", "days": 3}}', "", ONE),
    (LLAMA, '<|python_tag|>{"name": "weather", "parameters": {"city": "Köln", "days": 3}}', "", ONE),
    (
        LLAMA,
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Köln", "days": 3}}; {"name": "time"}',
        "",
        TWO,
    ),
    (LLAMA, '{"petals": 6}', '{"petals": 6}', []),
    (LLAMA, 'It is {"name": "weather"} there.', 'It is {"name": "weather"} there.', []),
    (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Köln", "days": 3}}]', "", ONE),
    (
        MISTRAL,
        'I look. [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln", "days": 3}},'
        ' {"name": "time"}]',
        "I look.",
        TWO,
    ),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Köln", "days": 3}[TOOL_CALLS]time[ARGS]{}', "", TWO),
    (MISTRAL, '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Köln", "days": 3}', "", ONE),
    (MISTRAL, "[TOOL_CALLS] nothing of the kind", "[TOOL_CALLS] nothing of the kind", []),
    (
        FUNCTIONS,
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "I look.",
        ONE,
    ),
    (
        FUNCTIONS,
        "<tool_call>\n<function=weather>\n<parameter=city>\n3\n</parameter>\n<parameter=days>\nmany\n"
        '</parameter>\n<parameter=parts>\n["day", 1]\n</parameter>\n</function>\n</tool_call>',
        "",
        [("weather", {"city": "3", "days": "many", "parts": ["day", 1]})],
    ),
    (FUNCTIONS, "<tool_call>\nhm\n</tool_call>", "<tool_call>\nhm\n</tool_call>", []),
    (
        FUNCTIONS,
        "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>",
        "",
        TWO,
    ),
]


def heard(form: CallForm, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """All text, and all calls with their arguments."""
    reader = CallReader(form, TYPES)
    text = ""
    names: list[str] = []
    arguments: list[str] = []
    for piece in [*(told for written in pieces for told in reader.push(written)), *reader.finish()]:
        match piece:
            case Called():
                names.append(piece.name)
                arguments.append("")
            case Argued():
                arguments[piece.index] += piece.text
            case _:
                text += piece
    return text, [(name, json.loads(each)) for name, each in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(("template", "form"), TAUGHT)
def test_a_template_tells_the_form(template: str | None, form: CallForm | None) -> None:
    assert form_of(template) is form


@pytest.mark.parametrize(("form", "written", "text", "calls"), WRITTEN)
def test_calls_are_read_as_the_family_writes_them(
    form: CallForm, written: str, text: str, calls: list[tuple[str, Any]]
) -> None:
    assert heard(form, [written]) == (text, calls)


@given(which=st.sampled_from(WRITTEN), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_however_an_answer_is_cut_the_same_is_read(
    which: tuple[CallForm, str, str, list[tuple[str, Any]]], cuts: list[int]
) -> None:
    form, written, text, calls = which
    places = sorted({0, len(written), *(cut % (len(written) + 1) for cut in cuts)})
    assert heard(form, [written[start:end] for start, end in pairwise(places)]) == (text, calls)


@given(
    form=st.sampled_from([LLAMA, MISTRAL, FUNCTIONS]), text=st.text(alphabet='<>[]{}"/=;,:ab \n', max_size=60)
)
def test_whatever_is_written_nothing_is_lost_without_a_call(form: CallForm, text: str) -> None:
    told, calls = heard(form, [text])
    if not calls:
        assert told.strip() == text.strip()
