"""Whatever arrives on a wire, reading it gives a message or a ProtocolError, and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.protocol import (
    Announcement,
    ChannelMessage,
    FromRelay,
    Greeting,
    PeerMessage,
    SignedRecord,
    ToRelay,
    decode,
    encode,
)

KINDS: list[Any] = [ToRelay, FromRelay, ChannelMessage, PeerMessage, Announcement, Greeting, SignedRecord]


def tags(union: Any) -> list[str]:  # noqa: ANN401 - a union is no type
    return [kind.__struct_config__.tag for kind in union.__args__]


def field_names() -> list[str]:
    structs = [*ToRelay.__args__, *FromRelay.__args__, *ChannelMessage.__args__, *PeerMessage.__args__]
    return sorted({name for struct in structs for name in struct.__struct_fields__})


TAGS = [tag for union in (ToRelay, FromRelay, ChannelMessage, PeerMessage) for tag in tags(union)]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["0" * 32, "0" * 64, "a" * 128, "serving", "float32", "busy", "offer"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(field_names()), inner, max_size=6),
    ),
    max_leaves=20,
)
almost_messages = st.builds(
    lambda tag, fields: {"type": tag, **fields},
    st.sampled_from(TAGS),
    st.dictionaries(st.sampled_from(field_names()), values, max_size=12),
)


def read(data: bytes | str, kind: Any) -> None:  # noqa: ANN401
    """What is read must also be a message that can be written."""
    try:
        message = decode(data, kind)
    except ProtocolError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert decode(encode(message), kind) == message


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(deadline=None)
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_any_bytes(kind: Any, data: bytes | str) -> None:  # noqa: ANN401
    read(data, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(deadline=None)
@given(message=st.one_of(almost_messages, values))
def test_almost_any_message(kind: Any, message: Any) -> None:  # noqa: ANN401
    try:
        data = orjson.dumps(message)
    except TypeError:
        return  # JSON has no such number
    read(data, kind)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    message=almost_messages,
    place=st.integers(0, 1000),
    byte=st.integers(0, 255),
    end=st.integers(0, 1000),
)
def test_almost_any_message_damaged(kind: Any, message: Any, place: int, byte: int, end: int) -> None:  # noqa: ANN401
    try:
        text = bytearray(orjson.dumps(message))
    except TypeError:
        return
    text[place % len(text)] = byte
    read(bytes(text[: max(1, end)]), kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"type":' * 5000,
        "1" * 100_000,
        "1e999",
        "-0",
        '"\\ud800"',
        "NaN",
        "\ufeff{}",
        '{"type":1}',
    ],
    ids=lambda text: text[:12],
)
def test_known_nasty_texts(kind: Any, text: str) -> None:  # noqa: ANN401
    with pytest.raises(ProtocolError):
        decode(text, kind)


def test_a_message_of_another_wire_is_refused() -> None:
    class Unknown(msgspec.Struct, tag="unknown"):
        pass

    with pytest.raises(ProtocolError, match="unknown"):
        decode(encode(Unknown()), ToRelay)
