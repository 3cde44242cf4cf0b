"""How model families write calls of tools, and which of these forms a chat template teaches. Pure.

The form is told by the template's own text, never by a model's name: a fine-tune keeps its template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

Json = Any
Types = Mapping[str, Mapping[str, str]]
"""By a tool's name and a parameter's, which type of JSON it wants."""


class WrittenCall(msgspec.Struct, frozen=True):
    """A call as a model wrote it. `arguments` are JSON text."""

    name: str
    arguments: str


class CallForm(msgspec.Struct, frozen=True):
    """What stands around calls, and what stands between."""

    begins: str
    """What a call, or the first of several, begins with."""
    ends: str
    """What it ends with; without one it ends with the answer."""
    read: Callable[[str, Types], list[WrittenCall]]
    """The calls in what stands between; none when it is text after all."""
    bare: bool = False
    """An answer that begins with a brace is a call too."""


def form_of(template: str | None) -> CallForm | None:
    """The form that a chat template teaches; None when it teaches none that is read here."""
    template = template or ""
    if HERMES.begins in template:
        return FUNCTIONS if "<function=" in template else HERMES
    if MISTRAL.begins in template:
        return MISTRAL
    if LLAMA.begins in template or re.search(r'"name\\?": ?.{0,80}"parameters\\?"', template):
        return LLAMA
    return None


# ---------------------------------------------------------------- reading


def _read_objects(body: str, types: Types) -> list[WrittenCall]:
    """JSON objects with a name and arguments: one, a list of them, or several with `;` between."""
    decoder = json.JSONDecoder(strict=False)
    found: list[Json] = []
    place = 0
    try:
        while rest := body[place:].lstrip(" \n\r\t;"):
            value, end = decoder.raw_decode(rest)
            found += value if isinstance(value, list) else [value]
            place = len(body) - len(rest) + end
    except (ValueError, RecursionError):
        return []
    calls = [_call_of(each) for each in found]
    return [call for call in calls if call] if all(calls) else []


def _call_of(value: Json) -> WrittenCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return WrittenCall(value["name"], text)


_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")


def _read_mistral(body: str, types: Types) -> list[WrittenCall]:
    """A list of objects; or, since 2025, a name, `[ARGS]` and an object, once for each call."""
    calls: list[WrittenCall] = []
    for part in body.split(MISTRAL.begins):
        named = _NAMED.match(part)
        if named is None:
            calls += _read_objects(part, types)
            continue
        try:
            arguments = json.loads(part[named.end() :], strict=False)
        except (ValueError, RecursionError):
            return []
        calls.append(WrittenCall(named[1], json.dumps(arguments, ensure_ascii=False)))
    return calls


_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*)?\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _read_functions(body: str, types: Types) -> list[WrittenCall]:
    """`<function=name>` with a `<parameter=name>` for each argument, whose value is plain text."""
    found = _FUNCTION.match(body)
    if found is None:
        return _read_objects(body, types)
    wanted = types.get(found[1], {})
    arguments = {
        name: _typed(value, wanted.get(name, "string")) for name, value in _PARAMETER.findall(found[2])
    }
    return [WrittenCall(found[1], json.dumps(arguments, ensure_ascii=False))]


def _typed(text: str, wanted: str) -> Json:
    """A value written as text; what is not of its type stays text, so that nothing is lost."""
    if wanted == "string":
        return text
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return text


def types_of(tools: Sequence[Mapping[str, Json]]) -> Types:
    """Which types the parameters of some tools have, as far as their schemas say so plainly."""
    found: dict[str, dict[str, str]] = {}
    for tool in tools:
        function = tool["function"]
        properties = (function.get("parameters") or {}).get("properties")
        schemas = properties.items() if isinstance(properties, dict) else ()
        found[function["name"]] = {
            name: kind
            for name, schema in schemas
            if isinstance(schema, dict) and isinstance(kind := schema.get("type"), str)
        }
    return found


HERMES = CallForm("<tool_call>", "</tool_call>", _read_objects)
"""Hermes, Qwen 2.5 and 3: `{"name": …, "arguments": …}` between marks."""
FUNCTIONS = CallForm("<tool_call>", "</tool_call>", _read_functions)
"""Qwen3-Coder: the same marks, with tags between."""
MISTRAL = CallForm("[TOOL_CALLS]", "", _read_mistral)
LLAMA = CallForm("<|python_tag|>", "", _read_objects, bare=True)
"""Llama 3.1 and later: `{"name": …, "parameters": …}` as the whole answer, with or without the mark."""

MARKS = (HERMES.begins, HERMES.ends, MISTRAL.begins, "[CALL_ID]", "[ARGS]", LLAMA.begins)
"""Many tokenizers have them as special tokens, which texts leave out."""
