"""Channels between two ends, over a real relay and real data channels on this machine."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

import pytest

from relay.settings import RelaySettings
from shared.channel import Channel, Listen, Priority, addresses
from shared.channel import channel as channel_file
from shared.channel.link import LinkKind
from shared.channel.path_choice import WINDOW_LEAST_BYTES
from shared.channel.path_choice import WINDOW_START_BYTES as WINDOW_BYTES
from shared.errors import ChannelClosed, ConnectionLost, ProtocolError
from shared.framing import CHUNK_BYTES
from shared.identity import Identity
from shared.protocol import MAX_BODY_BYTES, Path
from tests.harness.evil_relay import EvilRelay
from tests.shared.channel.ends import (
    End,
    Got,
    body_of,
    both_by,
    both_direct,
    cut_direct,
    ends,
    expect_numbers,
    mute,
    numbered,
    send_numbers,
    swallow_direct,
    until,
)


async def test_messages_go_both_ways_before_there_is_a_direct_link() -> None:
    async with ends(direct=False) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1), b"from ann")
        got = await bob.got()
        await got.channel.send(numbered(2), b"from bob")
        answer = await ann.got()

        assert (got.number, got.body, got.path) == (1, b"from ann", "relayed")
        assert (answer.number, answer.body, answer.path) == (2, b"from bob", "relayed")
        assert answer.channel is channel
        assert (channel.peer, got.channel.peer, channel.path) == (bob.id, ann.id, "relayed")


@pytest.mark.usefixtures("each_transport")
async def test_a_channel_becomes_direct_and_knows_its_round_trip() -> None:
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        await channel.send(numbered(1), b"straight")

        assert (await bob.got()).path == "direct"
        assert channel.rtt_ms is not None
        assert 0 < channel.rtt_ms < 1000


@pytest.mark.usefixtures("each_transport")
async def test_megabytes_survive_the_switch_from_relayed_to_direct() -> None:
    """Both ways at once, in messages of one frame and of many, without a pause at the switch."""

    def body(number: int) -> bytes:
        return random.Random(number).randbytes(60_000 if number % 5 == 0 else 2_000)

    async def stream(channel: Channel) -> int:
        number, after = 0, 0
        while after < 60:
            await channel.send(numbered(number), body(number))
            number += 1
            after += channel.path == "direct"
        return number

    async def check(end: End, count: int) -> set[Path]:
        paths = set()
        for number in range(count):
            got = await end.got()
            assert (got.number, got.body) == (number, body(number))
            paths.add(got.path)
        assert end.inbox.empty()
        return paths

    async with ends() as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await until(lambda: bob.dialer.channels)
        there, back = await asyncio.gather(stream(channel), stream(bob.channel_to(ann)))

        assert await check(bob, there) == await check(ann, back) == {"relayed", "direct"}
        assert there * 13_600 > 1_000_000


# Silence is noticed after 0.6 s by whoever watches, after 7 s else.
DEAF_S = 5.0


@pytest.mark.usefixtures("each_transport")
@pytest.mark.parametrize("harm", [cut_direct, swallow_direct])
async def test_a_stream_goes_on_by_the_relay_when_the_direct_link_dies(harm: object) -> None:
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        with channel.watched():
            sending = asyncio.create_task(send_numbers(channel, range(400), pause_s=0.002))
            await until(lambda: bob.inbox.qsize() > 50)
            (cut_direct if harm is cut_direct else swallow_direct)(channel)
            paths = await expect_numbers(bob, range(400))
            await sending

        assert paths[0] == "direct"
        assert paths[-1] == "relayed"
        assert channel.path == "relayed"


async def test_what_a_silent_direct_link_holds_goes_by_the_relay_when_that_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_file, "DIRECT_SILENT_S", 1000.0)
    monkeypatch.setattr(channel_file, "WATCHED", channel_file.WATCHED._replace(dead=1000))
    relay = EvilRelay()
    made = []
    for _ in range(2):
        identity = Identity.generate()
        made.append(End(identity, relay.connect(identity)))
    ann, bob = made
    async with ann.dialer, bob.dialer:
        channel = await both_direct(ann, bob)
        with channel.watched():
            relay.connections[ann.id].set_connected(False)
            swallow_direct(channel)
            await channel.send(numbered(1))
            await until(lambda: channel.direct is not None and not channel.direct.trusted)
            relay.connections[ann.id].set_connected(True)

            assert (await bob.got()).number == 1


@pytest.mark.parametrize("watchers", ["ann", "bob", "both"])
async def test_a_direct_link_that_is_deaf_in_one_direction_is_left_by_both(watchers: str) -> None:
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        back = bob.channel_to(ann)
        with ExitStack() as watching:
            if watchers != "bob":
                watching.enter_context(channel.watched())
            if watchers != "ann":
                watching.enter_context(back.watched())
            swallow_direct(channel)
            async with asyncio.timeout(DEAF_S):
                for sender, receiver in ((channel, bob), (back, ann)):
                    await send_numbers(sender, range(40))
                    await expect_numbers(receiver, range(40))
                await until(lambda: channel.path == back.path == "relayed")


@pytest.mark.usefixtures("each_transport")
async def test_a_direct_channel_outlives_its_relay() -> None:
    async with ends(settings=RelaySettings(port=0)) as (ann, bob):
        channel = await both_direct(ann, bob)
        with channel.watched():
            sending = asyncio.create_task(send_numbers(channel, range(200), pause_s=0.002))
            await until(lambda: bob.inbox.qsize() > 20)
            for end in (ann, bob):
                await end.relay._stop()  # type: ignore[attr-defined]
            await expect_numbers(bob, range(200))
            await sending

        assert not channel.closed.is_set()
        assert channel.path == "direct"


@pytest.mark.usefixtures("each_transport")
async def test_a_killed_peer_is_noticed_at_once() -> None:
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        with channel.watched():
            started = time.perf_counter()
            mute(bob.channel_to(ann))
            cut_direct(bob.channel_to(ann))
            await bob.relay._stop()  # type: ignore[attr-defined]
            await channel.closed.wait()

        assert time.perf_counter() - started < 1.0
        assert "relay lost it" in channel.reason
        assert await ann.closed.get() is channel
        with pytest.raises(ChannelClosed, match="closed"):
            await channel.send(numbered(1))


async def test_without_a_direct_link_the_relay_s_word_is_enough() -> None:
    async with ends(direct=False) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1))
        await bob.got()

        await bob.relay._stop()  # type: ignore[attr-defined]

        async with asyncio.timeout(0.5):
            await channel.closed.wait()


@pytest.mark.parametrize("direct", [False, True])
async def test_a_silent_peer_is_given_up_within_a_second_and_a_half(direct: bool) -> None:
    async with ends(direct=direct) as (ann, bob):
        channel = await (both_direct(ann, bob) if direct else ann.dialer.channel(bob.id))
        await channel.send(numbered(1))
        await bob.got()
        with channel.watched():
            await asyncio.sleep(0)
            mute(bob.channel_to(ann))
            started = time.perf_counter()
            await channel.closed.wait()

        assert 0.9 < time.perf_counter() - started < 1.5


async def test_a_stalled_event_loop_does_not_make_others_look_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_file, "WATCHED", channel_file.WATCHED._replace(tick_s=0.05))
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        with channel.watched(), bob.channel_to(ann).watched():
            await asyncio.sleep(0.2)
            time.sleep(0.8)  # noqa: ASYNC251 - the stall itself
            await asyncio.sleep(0.5)
            await channel.send(numbered(1))

            assert (await bob.got()).number == 1


async def test_both_dialling_at_once_end_with_one_channel() -> None:
    async with ends(direct=False) as (ann, bob):
        one, other = await asyncio.gather(ann.dialer.channel(bob.id), bob.dialer.channel(ann.id))
        await one.send(numbered(1))
        await other.send(numbered(2))

        assert (await bob.got()).channel is other
        assert (await ann.got()).channel is one
        assert len(ann.dialer._by_tag) == len(bob.dialer._by_tag) == 1


async def test_callers_share_one_attempt_and_one_channel() -> None:
    async with ends(direct=False) as (ann, bob):
        channels = await asyncio.gather(*(ann.dialer.channel(bob.id) for _ in range(5)))

        assert len(set(channels)) == 1
        assert await ann.dialer.channel(bob.id) is channels[0]


async def test_dialling_someone_who_is_not_there_fails_at_once_with_a_sentence() -> None:
    async with ends(1, direct=False) as [ann]:
        started = time.perf_counter()
        with pytest.raises(ConnectionLost, match="is not connected to any relay of ours"):
            await ann.dialer.channel(Identity.generate().id)

        assert time.perf_counter() - started < 1.0


async def test_a_caller_who_gives_up_does_not_spoil_it_for_others() -> None:
    async with ends(direct=False) as (ann, bob):
        hasty = asyncio.create_task(ann.dialer.channel(bob.id))
        patient = asyncio.create_task(ann.dialer.channel(bob.id))
        await asyncio.sleep(0)
        hasty.cancel()

        assert (await patient).peer == bob.id


async def test_closing_tells_the_other_side_why() -> None:
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        back = bob.channel_to(ann)

        await channel.close("the session is over")

        async with asyncio.timeout(1):
            await back.closed.wait()
        assert back.reason == "the session is over"
        assert not ann.dialer.channels
        assert not bob.dialer.channels
        assert (await ann.dialer.channel(bob.id)) is not channel


async def test_a_handler_may_close_its_own_channel() -> None:
    async with ends() as (ann, bob):
        bob.handle = lambda got: got.channel.close("enough")
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1))

        async with asyncio.timeout(2):
            await channel.closed.wait()
        assert channel.reason == "enough"


async def test_a_handler_s_protocol_error_ends_the_channel_and_nothing_else() -> None:
    async def refuse(got: Got) -> None:
        raise ProtocolError("that makes no sense")

    async with ends(3, direct=False) as (ann, bob, eve):
        innocent = await ann.dialer.channel(bob.id)
        guilty = await eve.dialer.channel(bob.id)
        await innocent.send(numbered(1))
        await bob.got()

        bob.handle = refuse
        await guilty.send(numbered(2))
        await guilty.closed.wait()
        bob.handle = None
        await innocent.send(numbered(3))

        assert guilty.reason == "that makes no sense"
        assert (await bob.got()).number == 3


async def test_a_handler_s_mistake_is_logged_and_ends_the_channel(caplog: pytest.LogCaptureFixture) -> None:
    def fail(got: Got) -> None:
        raise ZeroDivisionError

    async with ends(direct=False) as (ann, bob):
        bob.handle = fail
        channel = await ann.dialer.channel(bob.id)
        await channel.send(numbered(1))
        await channel.closed.wait()

    assert channel.reason == "an error on this side"
    assert "ZeroDivisionError" in caplog.text


KINDS: list[LinkKind] = ["relayed", "data channel", "socket"]


@asynccontextmanager
async def two_by(kind: LinkKind, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[End, End, Channel]]:
    """Two ends whose messages go by links of this kind alone."""
    monkeypatch.setattr(addresses, "LOOPBACK_TOO", True)
    listen = (Listen("127.0.0.1"), None) if kind == "socket" else ()
    async with ends(direct=kind != "relayed", listen=listen) as (ann, bob):
        channel = await both_by(kind, ann, bob)
        yield ann, bob, channel


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_handler_bounds_what_the_sender_may_send(
    kind: LinkKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_by(kind, monkeypatch) as (ann, bob, channel):
        gate = asyncio.Event()
        seen: list[int] = []

        async def slowly(got: Got) -> None:
            await gate.wait()
            seen.append(got.number)

        bob.handle = slowly
        sending = asyncio.create_task(send_numbers(channel, range(200), size=16_000))
        await until(lambda: channel._outbound._bytes > WINDOW_BYTES // 2)
        await asyncio.sleep(0.3)
        held = sum(len(arrived.message.body) for arrived in bob.channel_to(ann)._inbound.inbox)

        assert not sending.done()
        assert channel._outbound._bytes <= channel._outbound.window <= WINDOW_BYTES
        assert held <= WINDOW_BYTES
        gate.set()
        await sending
        await until(lambda: len(seen) == 200)
        assert seen == list(range(200))


async def test_a_reader_that_stays_slow_shrinks_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not read is not sent: neither the memory nor the relay's queues fill."""
    async with two_by("socket", monkeypatch) as (_, bob, channel):
        bob.handle = lambda got: asyncio.sleep(0.005)
        sending = asyncio.create_task(send_numbers(channel, range(10_000), size=16_000))
        await until(lambda: channel._outbound.window == WINDOW_LEAST_BYTES)
        await until(lambda: channel._outbound._bytes <= WINDOW_LEAST_BYTES)
        sending.cancel()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_token_waits_behind_a_bounded_number_of_frames_of_a_prefill(
    kind: LinkKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the prefill is: a token is the next frame, and what left before it fits in the window."""
    async with two_by(kind, monkeypatch) as (ann, bob, channel):
        outbound, inbound = channel._outbound, bob.channel_to(ann)._inbound
        windows = [outbound.window]
        resize = outbound.resize

        def note(window_bytes: int) -> None:
            windows.append(window_bytes)
            resize(window_bytes)

        monkeypatch.setattr(outbound, "resize", note)
        numbers: asyncio.Queue[int] = asyncio.Queue()

        def number_of(got: Got) -> None:
            assert inbound._in_hand is not None
            numbers.put_nowait(inbound._in_hand.sequence)

        bob.handle = number_of
        prefill = asyncio.create_task(channel.send(numbered(0), bytes(200_000_000), Priority.PREFILL))
        for number in range(1, 21):
            later = outbound.last + 20
            await until(lambda: outbound.last > later)  # noqa: B023 - called at once
            before, arrived = outbound.last, inbound.received
            await channel.send(numbered(number), body_of(number, 8_000), Priority.DECODE)

            assert await numbers.get() == before + 1
            assert before - arrived <= max(windows) * 0.75 / CHUNK_BYTES + 2
        assert not prefill.done()
        prefill.cancel()


async def test_urgent_frames_go_both_ways_round_while_the_path_is_doubted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with two_by("socket", monkeypatch) as (ann, bob, channel):
        back = bob.channel_to(ann)
        doubted = channel.socket
        assert doubted is not None
        channel._distrust(doubted)
        assert channel._path is not doubted
        carried: list[bytes] = []
        send = doubted.send

        def note(frame: bytes) -> None:
            carried.append(frame)
            send(frame)

        monkeypatch.setattr(doubted, "send", note)
        await channel.send(numbered(1), b"urgent", Priority.DECODE)
        await channel.send(numbered(2), b"not", Priority.PREFILL)
        assert [(await bob.got()).number for _ in range(2)] == [1, 2]
        await until(lambda: back._inbound.repeated == 1)

        channel._ping(doubted)
        await until(lambda: channel._path is doubted)
        before = back._inbound.repeated
        await channel.send(numbered(3))
        assert (await bob.got()).number == 3
        assert back._inbound.repeated == before
        assert sum(b"urgent" in frame for frame in carried) == 1


async def test_all_credit_comes_back_soon_after_the_last_message() -> None:
    async with ends(direct=False) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await send_numbers(channel, range(100))
        await expect_numbers(bob, range(100))
        started = time.perf_counter()
        await until(lambda: not channel._outbound.unconsumed)

        assert time.perf_counter() - started < 0.5


@pytest.mark.usefixtures("each_transport")
@pytest.mark.parametrize("direct", [False, True])
async def test_tokens_pass_a_prefill(direct: bool) -> None:
    async with ends(direct=direct) as (ann, bob):
        channel = await (both_direct(ann, bob) if direct else ann.dialer.channel(bob.id))
        size = 2_000_000 if direct else 20_000_000
        prefill = asyncio.create_task(channel.send(numbered(0), bytes(size), Priority.PREFILL))
        await until(lambda: channel._outbound.last > 50)
        assert not prefill.done()
        for number in range(1, 6):
            await channel.send(numbered(number), body_of(number, 4000), Priority.DECODE)

        assert [(await bob.got()).number for _ in range(6)] == [1, 2, 3, 4, 5, 0]
        await prefill


async def test_a_cancelled_send_leaves_the_channel_whole() -> None:
    async with ends(direct=False) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        long = asyncio.create_task(channel.send(numbered(0), bytes(8_000_000), Priority.PREFILL))
        await until(lambda: channel._outbound.last > 50)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        await channel.send(numbered(1), b"next", Priority.PREFILL)

        assert (await bob.got()).number == 1


async def test_a_send_cancelled_without_a_link_leaves_no_hole() -> None:
    async with ends(direct=False) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        gate = asyncio.Event()
        bob.handle = lambda got: gate.wait()
        long = asyncio.create_task(channel.send(numbered(0), bytes(8_000_000), Priority.PREFILL))
        await until(lambda: channel._outbound.last > 10)
        via, channel.relayed._via = channel.relayed._via, None
        long.cancel()
        await asyncio.wait([long])
        bob.handle = None
        channel.relayed._via = via
        await channel.send(numbered(1), b"next", Priority.PREFILL)

        assert (await bob.got()).number == 1


async def test_any_contiguous_buffer_is_a_body_but_not_one_over_the_cap() -> None:
    async with ends(direct=False) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        floats = memoryview(array("f", range(12))).cast("B").cast("f", (3, 4))
        await channel.send(numbered(1), floats)  # type: ignore[arg-type]
        await channel.send(numbered(2), bytearray(b"abc"))
        with pytest.raises(ProtocolError, match="longer than the protocol allows"):
            await channel.send(numbered(3), bytes(MAX_BODY_BYTES + 1))

        assert (await bob.got()).body == floats.tobytes()
        assert (await bob.got()).body == b"abc"


async def test_senders_who_wait_learn_that_the_channel_closed() -> None:
    async with ends(direct=False) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        gate = asyncio.Event()
        bob.handle = lambda got: gate.wait()
        sending = asyncio.create_task(send_numbers(channel, range(200), size=16_000))
        await asyncio.sleep(0.1)
        await channel.close()

        with pytest.raises(ChannelClosed):
            await sending


async def test_relay_only_ends_stay_on_the_relay() -> None:
    async with ends() as (ann, bob):
        bob.dialer._certificate = None
        channel = await ann.dialer.channel(bob.id)
        await until(lambda: channel._upgrade._remote is not None)
        await until(lambda: channel._upgrade._link is None)

        assert channel.path == "relayed"
        assert channel.direct is None


async def test_a_link_is_stopped_though_a_library_loses_the_first_cancellation() -> None:
    begun = asyncio.Event()

    async def deaf_once() -> None:
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(deaf_once())
    await begun.wait()
    async with asyncio.timeout(10):
        await channel_file._end([task])
    assert task.cancelled()
