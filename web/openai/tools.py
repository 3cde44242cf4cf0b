"""Calls of tools in what a model writes, in any of the forms of `web/call_forms.py`.

Text goes in piece by piece; text and calls come out, arguments in the form of Hermes as they grow. Pure.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Literal

import msgspec

from web.call_forms import HERMES, CallForm, Types, WrittenCall

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

    def __init__(self, form: CallForm = HERMES, types: Types | None = None) -> None:
        self.calls = 0
        self._form = form
        self._types = types or {}
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._held = ""
        self._said = False
        self._bare = False
        """The call began without its mark."""
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
            mark = "" if self._bare else self._form.begins
            told += self._read_whole(self._held) or self._say(mark + self._held)
        elif self._state == "text":
            told += self._say(self._held)
            if not self.calls and self._space:
                told.append(self._space)
        self._held = ""
        return told

    def _read_text(self) -> list[Piece]:
        before, mark, after = self._held.partition(self._form.begins)
        if self._form.bare and not mark and self._held.lstrip().startswith("{") and not self._said:
            before, mark, after, self._bare = "", "{", self._held, True
        if mark:
            self._state, self._held = "head", after
            told = self._say(before)
            self._space = ""
            return told
        keep = _beginning_of(self._form.begins, self._held)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return self._say(text)

    def _say(self, text: str) -> list[Piece]:
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        self._said = self._said or bool(said)
        return [said] if said else []

    def _read_head(self) -> list[Piece]:
        if self._form is HERMES and (found := HEAD.match(self._held)):
            try:
                name = json.loads(found[1], strict=False)
            except ValueError:
                name = found[1].strip('"')
            self._state, self._held = "arguments", self._held[found.end() :]
            self._arguments = _Scanner()
            return [self._call(name)]
        if not self._form.ends:
            return []
        body, mark, after = self._held.partition(self._form.ends)
        if not mark:
            return []
        self._state, self._held = "text", after
        return self._read_whole(body) or self._say(f"{self._form.begins}{body}{self._form.ends}")

    def _read_arguments(self) -> list[Piece]:
        count = self._arguments.count(self._held)
        text, self._held = self._held[:count], self._held[count:]
        if self._arguments.over:
            self._state = "tail"
        return [Argued(self.calls - 1, text)] if text else []

    def _read_tail(self) -> None:
        _, mark, after = self._held.partition(self._form.ends)
        if mark:
            self._state, self._held = "text", after

    def _read_whole(self, body: str) -> list[Piece]:
        """The calls in a body that is there as a whole; nothing when there are none."""
        return [piece for call in self._form.read(body, self._types) for piece in self._whole(call)]

    def _whole(self, call: WrittenCall) -> list[Piece]:
        begun = self._call(call.name)
        return [begun, Argued(begun.index, call.arguments)]

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
