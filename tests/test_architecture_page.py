"""docs/architecture.md says one sentence about every source file of the four rooms, and names no other."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
ROOMS = ("shared", "relay", "peer", "web")
SOURCE = {".py", ".js", ".css", ".html", ".svg"}
FETCHED = ROOT / "web" / "static" / "vendor"
"""Libraries that the install brings; git ignores them."""


def source_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in SOURCE and not path.is_relative_to(FETCHED)
    }


def described() -> Counter[str]:
    """The files that have a line of the list, with how many each."""
    return Counter(re.findall(r"^- `([^`]+)` \w.*\.$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_source_file_has_one_sentence() -> None:
    assert described() == Counter(source_files())


def test_every_file_that_the_page_names_is_there() -> None:
    named = re.findall(r"`([\w.]+(?:/[\w.]+)+)`", PAGE.read_text(encoding="utf-8"))
    linked = re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text(encoding="utf-8"))

    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in linked if not (PAGE.parent / name).exists()] == []


def test_files_stand_under_their_room() -> None:
    for section in PAGE.read_text(encoding="utf-8").split("\n### ")[1:]:
        room, _, text = section.partition("\n")
        files = re.findall(r"^- `([^`]+)`", text, re.MULTILINE)
        assert [file for file in files if not file.startswith(room)] == []
