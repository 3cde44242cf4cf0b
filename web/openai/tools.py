"""Calls of tools in what a model writes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

Text goes in piece by piece; text, and calls with their arguments as they grow, come out. Pure.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Literal

import msgspec

from web.tokenizer import CALL_BEGINS, CALL_ENDS

HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
"""A call up to its arguments, in the order in which nearly all models write it."""


class Called(msgspec.Struct, frozen=True):
    """The beginning of a call."""

    index: int
    id: str
    name: str


class Argued(msgspec.Struct, frozen=True):
    """More of a call's arguments, which are JSON text."""

    index: int
    text: str


Piece = str | Called | Argued


class CallReader:
    """Give it an answer in pieces; it tells text and calls as soon as they are certain."""

    def __init__(self) -> None:
        self.calls = 0
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._held = ""
        self._space = ""
        """White space that is told only if text follows it."""
        self._arguments = _Scanner()

    def push(self, text: str) -> list[Piece]:
        self._held += text
        told: list[Piece] = []
        while True:
            before = (self._state, len(self._held))
            match self._state:
                case "text":
                    told += self._read_text()
                case "head":
                    told += self._read_head()
                case "arguments":
                    told += self._read_arguments()
                case "tail":
                    self._read_tail()
            if (self._state, len(self._held)) == before:
                return told

    def finish(self) -> list[Piece]:
        """The answer is over: what looked like the beginning of a call was text after all."""
        told: list[Piece] = []
        if self._state == "head":
            told += self._read_whole(self._held) or self._say(CALL_BEGINS + self._held)
        elif self._state == "text":
            told += self._say(self._held)
            if not self.calls and self._space:
                told.append(self._space)
        self._held = ""
        return told

    def _read_text(self) -> list[Piece]:
        before, mark, after = self._held.partition(CALL_BEGINS)
        if mark:
            self._state, self._held = "head", after
            told = self._say(before)
            self._space = ""
            return told
        keep = _beginning_of(CALL_BEGINS, self._held)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return self._say(text)

    def _say(self, text: str) -> list[Piece]:
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        return [said] if said else []

    def _read_head(self) -> list[Piece]:
        if found := HEAD.match(self._held):
            try:
                name = json.loads(found[1], strict=False)
            except ValueError:
                name = found[1].strip('"')
            self._state, self._held = "arguments", self._held[found.end() :]
            self._arguments = _Scanner()
            return [self._call(name)]
        body, mark, after = self._held.partition(CALL_ENDS)
        if not mark:
            return []
        self._state, self._held = "text", after
        return self._read_whole(body) or self._say(f"{CALL_BEGINS}{body}{CALL_ENDS}")

    def _read_arguments(self) -> list[Piece]:
        count = self._arguments.count(self._held)
        text, self._held = self._held[:count], self._held[count:]
        if self._arguments.over:
            self._state = "tail"
        return [Argued(self.calls - 1, text)] if text else []

    def _read_tail(self) -> None:
        _, mark, after = self._held.partition(CALL_ENDS)
        if mark:
            self._state, self._held = "text", after

    def _read_whole(self, body: str) -> list[Piece]:
        """A call whose parts come in another order; nothing when it is none."""
        try:
            call = json.loads(body, strict=False)
            name = call["name"]
            arguments = call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        if not isinstance(name, str):
            return []
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        begun = self._call(name)
        return [begun, Argued(begun.index, text)]

    def _call(self, name: str) -> Called:
        self.calls += 1
        return Called(self.calls - 1, f"call_{secrets.token_hex(12)}", name)


class _Scanner:
    """Finds the end of one JSON object, piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.over = False

    def count(self, text: str) -> int:
        """How many characters of the text belong to the object."""
        for place, letter in enumerate(text):
            if self.over:
                return place
            self._take(letter)
        return len(text)

    def _take(self, letter: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = True
            elif letter == '"':
                self._in_string = False
        elif letter == '"':
            self._in_string = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
            self.over = self._depth == 0


def _beginning_of(mark: str, text: str) -> int:
    """Length of the longest end of the text with which the mark begins."""
    return next(
        (count for count in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-count:])), 0
    )
