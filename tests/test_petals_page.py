"""The page of counterparts names tests that are there."""

from __future__ import annotations

import re

from tests.harness.commands import ROOT

PAGE = (ROOT / "docs" / "petals-assertions.md").read_text(encoding="utf-8")


def test_every_counterpart_is_a_test_that_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 25
    absent = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert absent == []
