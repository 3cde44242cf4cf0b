"""The grammars that answers are held to: JSON by a schema, or the call of a tool. Peers follow them.

Each is checked here first, by the library that the peers use, so that a client hears what is wrong with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from shared.protocol import MAX_GRAMMAR_LENGTH
from web.openai.errors import bad_request
from web.openai.requests import ResponseFormat, Tool

Json = dict[str, Any]

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"
"""Between the parts of JSON. Without an end some models would indent for ever."""


async def grammar_of_format(wanted: ResponseFormat | None) -> str:
    """The grammar of a `response_format`; none for free text. Raises ApiError."""
    if wanted is None or wanted.type == "text":
        return ""
    if wanted.type == "json_object":
        return await grammar_of_schema({"type": "object"}, "response_format")
    if wanted.json_schema is None:
        where = "response_format.json_schema"
        raise bad_request(f"{where}: it is missing, and the type is json_schema", where)
    # Without a schema inside, any object will do, as OpenAI has it.
    schema = wanted.json_schema.schema
    return await grammar_of_schema(
        {"type": "object"} if schema is None else schema, "response_format.json_schema.schema"
    )


async def grammar_of_call(tools: Sequence[Tool]) -> str:
    """A call of one of these tools: its name, and arguments by its schema."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": parameters_of(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return await grammar_of_schema(calls[0] if len(calls) == 1 else {"anyOf": calls}, "tools")


def parameters_of(tool: Tool) -> Json:
    """The schema of a tool's arguments; any object where it says nothing."""
    return tool.function.parameters or {"type": "object", "properties": {}}


async def grammar_of_schema(schema: Json, param: str) -> str:
    """Raises ApiError that names the parameter when the schema cannot be followed."""
    # In a thread: a schema may be made to take a while.
    grammar, wrong = await asyncio.to_thread(_read_schema, schema)
    if wrong:
        raise bad_request(f"{param}: this schema cannot be followed: {wrong}", param)
    return grammar


def _read_schema(schema: Json) -> tuple[str, str]:
    """The grammar, and what is wrong with it."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    except (ValueError, RecursionError) as error:
        return "", str(error)[:300]
    if len(grammar) > MAX_GRAMMAR_LENGTH:
        return "", f"it is longer than {MAX_GRAMMAR_LENGTH} characters"
    return grammar, LLMatcher.validate_grammar(grammar).partition("\n")[0][:300]
