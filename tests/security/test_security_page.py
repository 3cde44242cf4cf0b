"""docs/security.md has one row for each threat, and the tests that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
IN_THIS_SUITE = {1, 3, 14, 15, 17, 18, 19, 20}


def rows() -> dict[int, str]:
    return {
        int(row[1]): row[0]
        for row in re.finditer(r"^\| (\d+) \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_every_threat_has_one_row_that_names_tests() -> None:
    assert sorted(rows()) == list(range(1, 21))
    for row in rows().values():
        assert re.findall(r"`tests/[\w/]+\.py`", row), row


def test_the_tests_that_it_names_are_there() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)`", PAGE.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_each_test_of_this_suite_names_a_row_that_names_its_file() -> None:
    found = set()
    for file in Path(__file__).parent.glob("test_evil_*.py"):
        for number in map(int, re.findall(r"def test_row_(\d+)_", file.read_text(encoding="utf-8"))):
            assert file.relative_to(ROOT).as_posix() in rows()[number], (number, file.name)
            found.add(number)
    assert found == IN_THIS_SUITE
