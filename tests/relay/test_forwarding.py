"""Frames pass between two participants unread, and one that does not read harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from relay.app import Relay
from relay.forwarding import MAX_PAYLOAD_BYTES
from relay.settings import RelaySettings
from shared.identity import Identity
from tests.relay.parties import Wire, member, party, soon


async def test_frames_arrive_whole_and_in_order_with_their_source(relay: Relay) -> None:
    payloads = [os.urandom(size) for size in (0, 1, 31, 32, 33, 1000, 65536, MAX_PAYLOAD_BYTES)]
    async with party(relay) as ann, party(relay) as bob:
        for payload in payloads:
            await ann.client.send_frame(bob.id, payload[:10], memoryview(payload)[10:])

        assert [await soon(bob.heard.frames) for _ in payloads] == [(ann.id, payload) for payload in payloads]


async def test_a_frame_may_go_to_oneself(relay: Relay) -> None:
    async with party(relay) as ann:
        await ann.client.send_frame(ann.id, b"note")
        assert await soon(ann.heard.frames) == (ann.id, b"note")


async def test_frames_of_a_wrong_size_are_denied_and_the_connection_stays(relay: Relay) -> None:
    async with member(relay) as ann, party(relay) as bob:
        for frame in (b"", bytes(31), bytes.fromhex(bob.id) + bytes(MAX_PAYLOAD_BYTES + 1)):
            await ann.socket.send_bytes(frame)
            denied = await ann.denied()
            assert f"not {len(frame)} in all" in denied.reason and not denied.fatal

        await ann.socket.send_bytes(bytes.fromhex(bob.id) + b"fine")
        assert await soon(bob.heard.frames) == (ann.identity.id, b"fine")


async def test_a_frame_to_nobody_costs_its_sender_a_word(relay: Relay) -> None:
    nobody = Identity.generate().id
    async with party(relay) as ann:
        await ann.client.send_frame(nobody, b"hello?")
        assert await soon(ann.heard.gone) == nobody
    assert relay.meeting.frames.undeliverable == 1


async def fill(relay: Relay, sender: Wire, receiver: Identity) -> int:
    """Send to one who does not read until the relay drops; returns how many frames it took."""
    frame = bytes.fromhex(receiver.id) + bytes(65536)
    for count in range(2000):
        await sender.socket.send_bytes(frame)
        await asyncio.sleep(0)
        if relay.meeting.frames.dropped:
            return count
    raise AssertionError("the relay takes everything")


async def test_a_reader_that_sleeps_stalls_nobody() -> None:
    settings = RelaySettings(port=0, frame_backlog_bytes=256 * 1024)
    identity = Identity.generate()
    async with (
        Relay(settings) as relay,
        member(relay) as ann,
        party(relay) as bob,
        party(relay) as eve,
        member(relay, identity),
    ):
        await fill(relay, ann, identity)

        denied = await ann.denied()
        assert denied.peer == identity.id and "too slowly" in denied.reason and not denied.fatal
        waiting = relay.meeting.participants.get(identity.id)
        assert waiting is not None
        assert waiting._transport.get_write_buffer_size() <= 256 * 1024

        started = time.perf_counter()
        await bob.client.send_frame(eve.id, b"still here?")
        assert await soon(eve.heard.frames) == (bob.id, b"still here?")
        assert time.perf_counter() - started < 0.5


async def test_a_sleeper_that_wakes_gets_what_was_kept() -> None:
    settings = RelaySettings(port=0, frame_backlog_bytes=128 * 1024)
    async with Relay(settings) as relay, member(relay) as ann, member(relay) as sleeper:
        sent = await fill(relay, ann, sleeper.identity)
        received = 0
        await ann.denied()
        while received < sent - relay.meeting.frames.dropped:
            message = await asyncio.wait_for(sleeper.socket.receive(), 5)
            assert len(message.data) == 32 + 65536
            received += 1

        await ann.socket.send_bytes(bytes.fromhex(sleeper.identity.id) + b"again")
        while len((await asyncio.wait_for(sleeper.socket.receive(), 5)).data) != 32 + 5:
            pass


async def test_who_never_reads_what_it_asked_for_is_disconnected() -> None:
    settings = RelaySettings(port=0, control_backlog_bytes=64 * 1024)
    async with Relay(settings) as relay, party(relay) as bob, member(relay) as sleeper:
        nobody = bytes.fromhex(Identity.generate().id)
        transport = sleeper.socket._response.connection.transport  # type: ignore[union-attr]
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()
        with contextlib.suppress(ConnectionError):
            while sleeper.identity.id in relay.meeting.participants:
                # Each costs the relay an answer, three times as long.
                for _ in range(1000):
                    await sleeper.socket.send_bytes(nobody)
                await asyncio.sleep(0)
        await bob.client.send_frame(sleeper.identity.id, b"gone?")
        assert await soon(bob.heard.gone) == sleeper.identity.id

        assert await bob.client.lookup() == []
