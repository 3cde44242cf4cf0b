"""Binary messages by the short way and all else by aiohttp: nothing is lost, changed or overtaken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import cycle, pairwise
from typing import NamedTuple

import aiohttp
import pytest
from aiohttp import web
from aiohttp._websocket.reader import WebSocketDataQueue
from aiohttp.http_websocket import WebSocketReader
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from relay.app import Relay
from relay.settings import RelaySettings
from shared.short_way import BINARY, TEXT, ShortWay, client_writer, server_frame, shorten
from tests.relay.parties import party, soon

MASK = b"\x11\x22\x33\x44"


class Message(NamedTuple):
    """A message as its sender cuts it; a ping has one piece."""

    kind: int
    pieces: tuple[bytes, ...]

    @property
    def payload(self) -> bytes:
        return b"".join(self.pieces)


def on_the_wire(message: Message, *, masked: bool) -> bytes:
    """RFC 6455 §5.2, written down once more."""
    frames = []
    for number, piece in enumerate(message.pieces):
        last = number == len(message.pieces) - 1
        first = (0x80 if last else 0) | (message.kind if number == 0 else 0)
        bit = 0x80 if masked else 0
        if len(piece) < 126:
            head = bytes([first, bit | len(piece)])
        elif len(piece) < 65536:
            head = bytes([first, bit | 126]) + len(piece).to_bytes(2, "big")
        else:
            head = bytes([first, bit | 127]) + len(piece).to_bytes(8, "big")
        hidden = bytes(a ^ b for a, b in zip(piece, cycle(MASK), strict=False)) if masked else piece
        frames.append(head + (MASK if masked else b"") + hidden)
    return b"".join(frames)


payloads = st.one_of(
    st.binary(max_size=40), st.sampled_from([bytes(125), bytes(126), bytes(range(256)) * 3, b"z" * 70_000])
)
texts = st.text(max_size=40).map(str.encode)
messages = st.one_of(
    st.builds(Message, st.just(2), st.tuples(payloads)),
    st.builds(Message, st.just(2), st.tuples(payloads, payloads)),
    st.builds(Message, st.just(1), st.tuples(texts)),
    st.builds(Message, st.just(9), st.tuples(st.binary(max_size=20))),
)


class _Queue(WebSocketDataQueue):
    """Where aiohttp's parser puts what it found."""

    def __init__(self, found: list[tuple[int, bytes]]) -> None:
        super().__init__(None, 1 << 30, loop=None)  # type: ignore[arg-type]
        self._found = found

    def feed_data(self, message: aiohttp.WSMessage, size: int) -> None:  # type: ignore[override]
        data = message.data.encode() if isinstance(message.data, str) else bytes(message.data)
        self._found.append((int(message.type), data))


class Reader:
    """Whoever reads the connection: hears the short way at once, and the long way when it gets to it."""

    def __init__(self, *, masked: bool) -> None:
        self.heard: list[tuple[int, bytes]] = []
        self.short = 0
        self._waiting: list[tuple[int, bytes]] = []
        self._aiohttp = WebSocketReader(_Queue(self._waiting), 1 << 22, compress=False, decode_text=True)
        unmask = (lambda mask, data: _xor(mask, data)) if masked else None
        self.way = ShortWay(self._aiohttp, self._take, unmask)

    def _take(self, payload: memoryview) -> bool:
        self.short += 1
        self.heard.append((2, bytes(payload)))
        return True

    def turn(self) -> None:
        for kind, data in self._waiting:
            self.heard.append((kind, data))
            if kind < 8:
                self.way.handled()
        self._waiting.clear()


def _xor(mask: bytes, data: bytearray) -> None:
    for place in range(len(data)):
        data[place] ^= mask[place % 4]


def pieces_of(stream: bytes, cuts: Iterable[int]) -> Iterable[bytes]:
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[start:end] for start, end in pairwise(places)]


@given(
    sent=st.lists(messages, max_size=8),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=8),
    turns=st.lists(st.booleans(), min_size=1),
    masked=st.booleans(),
)
def test_every_message_arrives_whole_and_in_order(
    sent: list[Message], cuts: list[int], turns: list[bool], masked: bool
) -> None:
    reader = Reader(masked=masked)
    stream = b"".join(on_the_wire(message, masked=masked) for message in sent)
    for piece, has_time in zip(pieces_of(stream, cuts), cycle(turns), strict=False):
        assert reader.way.feed_data(piece)[0] is False
        if has_time:
            reader.turn()
    reader.turn()

    # Pings may be answered before what was sent before them, as RFC 6455 §5.5 allows.
    in_order = [(message.kind, message.payload) for message in sent if message.kind < 8]
    pings = [message.payload for message in sent if message.kind == 9]
    assert [each for each in reader.heard if each[0] < 8] == in_order
    assert [data for kind, data in reader.heard if kind == 9] == pings


def test_what_follows_an_unhandled_text_waits_for_it() -> None:
    reader = Reader(masked=False)
    text, frame = Message(1, (b"first",)), Message(2, (b"second",))
    stream = on_the_wire(text, masked=False) + on_the_wire(frame, masked=False)
    reader.way.feed_data(stream)
    assert reader.heard == []
    reader.turn()
    reader.way.feed_data(on_the_wire(frame, masked=False))

    assert reader.heard == [(1, b"first"), (2, b"second"), (2, b"second")]
    assert reader.short == 1


def test_a_refused_message_goes_the_long_way() -> None:
    reader = Reader(masked=False)
    reader.way.take = lambda _: False
    reader.way.feed_data(on_the_wire(Message(2, (b"later",)), masked=False))
    reader.turn()

    assert reader.heard == [(2, b"later")]
    assert reader.short == 0


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
@pytest.mark.parametrize("kind", [TEXT, BINARY])
def test_a_server_s_messages_are_written_as_the_standard_says(kind: int, size: int) -> None:
    payload = bytes(size)
    assert server_frame(kind, payload) == on_the_wire(Message(kind & 15, (payload,)), masked=False)


async def test_aiohttp_is_as_we_know_it() -> None:
    """When this fails after an update of aiohttp, everything works as before, but more slowly."""
    taken: list[bytes] = []

    def take(payload: memoryview) -> bool:
        taken.append(bytes(payload))
        return True

    async def serve(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        way = shorten(request.protocol, take, masked=True)
        async for message in socket:
            await socket.send_bytes(message.data.encode())
            way.handled()
        return socket

    app = web.Application()
    app.router.add_get("/", serve)
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    def hear(payload: memoryview) -> bool:
        heard.put_nowait(bytes(payload))
        return True

    async with (
        TestServer(app) as server,
        aiohttp.ClientSession() as http,
        http.ws_connect(server.make_url("/")) as socket,
    ):
        assert socket._conn is not None
        shorten(socket._conn.protocol, hear, masked=False)
        await socket.send_bytes(b"short")
        await socket.send_str("long")

        assert await heard.get() == b"long"
    assert taken == [b"short"]


async def test_frames_pass_a_relay_by_the_short_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def long_way(*_: object) -> None:
        raise AssertionError("a frame went the long way")

    monkeypatch.setattr("relay.sessions._Session._carry", long_way)
    async with Relay(RelaySettings(port=0)) as relay, party(relay) as ann, party(relay) as bob:
        monkeypatch.setattr(ann.client, "_frame", long_way)
        monkeypatch.setattr(bob.client, "_frame", long_way)
        for size in (0, 1, 1000, 65_536):
            await ann.client.send_frame(bob.id, bytes(size))
            assert await soon(bob.heard.frames) == (ann.id, bytes(size))


async def test_where_a_client_cannot_write_by_itself_aiohttp_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.relay_client.client_writer", lambda socket: None)
    async with Relay(RelaySettings(port=0)) as relay, party(relay) as ann, party(relay) as bob:
        assert not ann.client.send_at_once(bob.id, b"now")
        for size in (0, 1000, 65_536):
            await ann.client.send_frame(bob.id, bytes(size))
            assert await soon(bob.heard.frames) == (ann.id, bytes(size))


async def test_a_relay_of_another_make_reads_what_a_client_writes_by_itself() -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            heard.put_nowait(message.data)
        return socket

    app = web.Application()
    app.router.add_get("/", serve)
    async with (
        TestServer(app) as server,
        aiohttp.ClientSession() as http,
        http.ws_connect(server.make_url("/")) as socket,
    ):
        writer = client_writer(socket)
        assert writer is not None
        for size in (0, 1, 125, 126, 65_535, 65_536):
            payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
            assert writer.write((payload[: size // 3], memoryview(payload)[size // 3 :]), 1 << 20)
            assert await heard.get() == payload
        assert not writer.write((b"no room",), 0)
