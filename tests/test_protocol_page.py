"""docs/protocol.md names every message with its fields, in its wire's table, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, get_args

import msgspec
import pytest

from shared import protocol

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
VALUES = "Values inside messages"
"""The heading of the table of structs that are no message of their own."""

MESSAGES: dict[str, tuple[type[msgspec.Struct], ...]] = {
    "ToRelay": get_args(protocol.ToRelay),
    "FromRelay": get_args(protocol.FromRelay),
    "ChannelMessage": get_args(protocol.ChannelMessage),
    "PeerMessage": get_args(protocol.PeerMessage),
}


class Row(NamedTuple):
    """What a row of a table says of one struct, in the order in which it says it."""

    names: list[str]
    fields: list[str]


def rows(heading: str) -> list[Row]:
    """The rows of the one table under the heading that contains these words."""
    sections = re.split(r"^#+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [section] = [section for section in sections if heading in section.partition("\n")[0]]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [_row(line) for line in lines[2:]]


def _row(line: str) -> Row:
    cells = line.strip("|").split("|")
    assert len(cells) == 5, f"a row needs five cells: {line}"
    assert all(cell.strip() for cell in cells), f"a row has an empty cell: {line}"
    return Row(*(re.findall(r"`([^`]+)`", cells[column]) for column in (0, 2)))


def row_of(kind: type[msgspec.Struct]) -> Row:
    config = kind.__struct_config__
    names = [str(config.tag), kind.__name__] if config.tag is not None else [kind.__name__]
    return Row(names, list(kind.__struct_fields__))


@pytest.mark.parametrize("wire", MESSAGES)
def test_each_message_of_a_wire_has_one_row_with_its_fields(wire: str) -> None:
    assert rows(f"`{wire}`") == [row_of(kind) for kind in MESSAGES[wire]]


def test_each_value_inside_messages_has_one_row_with_its_fields() -> None:
    messages = {kind for wire in MESSAGES.values() for kind in wire}
    values = {
        kind.__name__: kind
        for kind in vars(protocol).values()
        if isinstance(kind, type)
        and issubclass(kind, msgspec.Struct)
        and kind.__module__ == protocol.__name__
        if kind not in messages
    }

    described = {row.names[0]: row for row in rows(VALUES)}

    assert described == {name: row_of(kind) for name, kind in values.items()}
    assert len(rows(VALUES)) == len(values)


def test_every_tag_of_a_flow_is_a_message() -> None:
    tags = {str(kind.__struct_config__.tag) for wire in MESSAGES.values() for kind in wire}
    arrows = re.findall(
        r"^ +\w+->>\w+: (?:sealed frame through the relay: )?(\w+)", PAGE.read_text(), re.MULTILINE
    )

    assert set(arrows) - tags == {"WebSocket"}
