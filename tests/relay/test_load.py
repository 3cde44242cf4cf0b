"""What a relay does with those who ask for too much: it slows or refuses them, and nobody else notices."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest

import relay.meeting
from relay.app import Relay
from relay.participants import LEAST_BACKLOG_BYTES, Backlog
from relay.settings import UNLIMITED, Rate, RelaySettings
from shared.errors import RelayUnreachable
from shared.identity import Identity
from shared.protocol import Announce, Denied, Found, Lookup
from shared.relay_client import RelayClient
from tests.relay.parties import announced, member, party, soon, stranger, until
from tests.shared.channel.ends import ends, expect_numbers, send_numbers


async def test_who_sends_too_many_bytes_is_read_more_slowly_and_loses_nothing() -> None:
    """600 kB at 1 MB/s, of which 100 kB may come at once, take half a second."""
    settings = RelaySettings(port=0, participant_bytes=Rate(1e6, 1e5))
    async with Relay(settings) as relay, party(relay) as ann, party(relay) as bob:
        started = time.monotonic()
        sending = asyncio.create_task(send_numbered(ann.client, bob.id, 30, 20_000))
        received = [(await soon(bob.heard.frames))[1][0] for _ in range(30)]
        await sending

        assert received == list(range(30))
        assert time.monotonic() - started > 0.4
        assert relay.meeting.counts.slowed_s > 0.4


async def test_nobody_waits_for_one_who_sends_too_much() -> None:
    """At one byte per second Ann's turn would come in days."""
    settings = RelaySettings(port=0, participant_bytes=Rate(1, 1e5), address_bytes=UNLIMITED)
    async with Relay(settings) as relay, party(relay) as ann, party(relay) as bob, party(relay) as eve:
        sending = asyncio.create_task(send_numbered(ann.client, bob.id, 200, 60_000))
        await until(lambda: relay.meeting.counts.slowed_s > 1000)
        await eve.client.send_frame(bob.id, b"quick")
        while (await soon(bob.heard.frames))[0] != eve.id:
            pass
        assert not sending.done()  # what is not read piles up at its sender
        sending.cancel()


async def test_a_channel_whose_bytes_are_slowed_is_slow_and_not_dead() -> None:
    """Its credits bound what is on its way, so its pings still come through in time."""
    settings = RelaySettings(port=0, participant_bytes=Rate(1e6, 1e5))
    async with ends(direct=False, settings=settings) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        with channel.watched():
            sending = asyncio.create_task(send_numbers(channel, range(100), size=20_000))
            await expect_numbers(bob, range(100), size=20_000)
            await sending
            assert not channel.closed.is_set() and ann.channel_to(bob) is channel


async def test_the_bytes_of_all_connections_of_an_address_count_together() -> None:
    settings = RelaySettings(port=0, participant_bytes=UNLIMITED, address_bytes=Rate(1e6, 1e5))
    async with Relay(settings) as relay, party(relay) as ann, party(relay) as bob, party(relay) as eve:
        started = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for one in (ann, bob):
                tasks.create_task(send_numbered(one.client, eve.id, 15, 20_000))
        for _ in range(30):
            await soon(eve.heard.frames)
        assert time.monotonic() - started > 0.4


async def send_numbered(client: RelayClient, receiver: str, count: int, size: int) -> None:
    for number in range(count):
        await client.send_frame(receiver, bytes([number]) * size)  # type: ignore[arg-type]


async def test_an_answer_to_a_lookup_counts_as_bytes_too() -> None:
    settings = RelaySettings(port=0, participant_bytes=Rate(10_000, 2000))
    async with Relay(settings) as relay, party(relay) as ann:
        await ann.client.announce(announced(ann.identity))
        started = time.monotonic()
        for _ in range(6):
            assert len(await ann.client.lookup()) == 1
        assert time.monotonic() - started > 0.1


async def test_an_address_that_holds_too_many_connections_is_told_when_to_return() -> None:
    async with Relay(RelaySettings(port=0, address_connections=2)) as relay, stranger(relay), member(relay):
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                await http.ws_connect(f"{relay.url}/ws")
        assert refusal.value.status == 429
        assert refusal.value.headers is not None and refusal.value.headers["Retry-After"] == "30"
        with pytest.raises(RelayUnreachable, match="too many connections from this address") as error:
            async with RelayClient(relay.url, Identity.generate()):
                pass
        assert error.value.retry_after_s == 30
        assert relay.meeting.counts.refused_connections == 2


async def test_a_place_is_free_again_when_a_connection_ends() -> None:
    async with Relay(RelaySettings(port=0, address_connections=1)) as relay:
        for _ in range(3):
            async with member(relay) as wire:
                wire.die()
            await until(lambda: relay.meeting.connections == 0)


async def test_an_address_that_connects_too_often_is_told_when_to_return() -> None:
    async with Relay(RelaySettings(port=0, address_new_connections=Rate(0.001, 2))) as relay:
        for _ in range(2):
            async with member(relay):
                pass
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            async with stranger(relay):
                pass
        assert refusal.value.status == 429
        assert refusal.value.headers is not None and 900 < int(refusal.value.headers["Retry-After"]) <= 1000


async def test_behind_a_proxy_each_address_has_its_own_limits() -> None:
    forwarded = [{"X-Forwarded-For": f"9.9.9.9, 198.51.100.{number}"} for number in (1, 2)]
    async with (
        Relay(RelaySettings(port=0, address_connections=1)) as relay,
        stranger(relay, None, **forwarded[0]) as one,
        stranger(relay, None, **forwarded[1]),
    ):
        await one.login()
        assert (await one.welcomed()).address == "198.51.100.1"
        with pytest.raises(aiohttp.WSServerHandshakeError):
            async with stranger(relay, None, **forwarded[0]):
                pass


async def test_who_announces_too_often_is_refused_once_and_told_when_to_ask_again() -> None:
    now = time.time()
    async with (
        Relay(RelaySettings(port=0, participant_announcements=Rate(0.001, 2))) as relay,
        member(relay) as ann,
    ):
        for sequence in (1, 2, 3):
            await ann.say(Announce(announced(ann.identity, now, sequence=sequence)))
        denied = await ann.denied()
        assert "announces itself too often; come back in 1000 s" in denied.reason
        assert 900 < denied.retry_after_s <= 1000 and not denied.fatal

        await ann.say(Lookup(request=1))
        found = await ann.hear()
        assert isinstance(found, Found) and '"sequence":2' in found.records[0].body
        assert relay.meeting.counts.refused_announcements == 1


async def test_limits_outlive_a_connection() -> None:
    identity = Identity.generate()
    async with Relay(RelaySettings(port=0, participant_announcements=Rate(0.001, 1))) as relay:
        for sequence in (1, 2):
            async with member(relay, identity) as ann:
                await ann.say(Announce(announced(identity, sequence=sequence)))
                await ann.say(Lookup(request=1))
                assert isinstance(await ann.hear(), Found if sequence == 1 else Denied)


async def test_a_refused_announcement_is_made_again_when_it_may_be() -> None:
    async with (
        Relay(RelaySettings(port=0, participant_announcements=Rate(20, 1))) as relay,
        party(relay) as ann,
        party(relay) as eve,
    ):
        eve.watch()
        first, second = (announced(ann.identity, sequence=sequence) for sequence in (1, 2))
        await ann.client.announce(first)
        await ann.client.announce(second)
        assert "too often" in await soon(ann.heard.denied)
        await eve.hears(second)


async def test_who_says_nothing_and_serves_nobody_has_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay.meeting, "TIDY_EVERY_S", 0.02)
    async with Relay(RelaySettings(port=0, idle_s=0.1)) as running:
        async with member(running) as idle, member(running) as peer, member(running) as watcher:
            await peer.say(Announce(announced(peer.identity)))
            await watcher.say(Lookup(request=1, watch=True))
            denied = await idle.denied()
            assert denied.fatal and "nothing was said" in denied.reason
            await idle.ended()
            await until(lambda: len(running.meeting.participants) == 2)
            assert peer.identity.id in running.meeting.participants
            assert watcher.identity.id in running.meeting.participants
        assert running.meeting.counts.idle == 1


async def test_a_connection_that_asks_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.app.SILENT_S", 0.1)
    async with Relay(RelaySettings(port=0)) as running:
        for word in (b"", b"GET /ws HTT"):
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(word)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()


def test_the_more_slow_readers_there_are_the_less_may_wait_for_each() -> None:
    mib = 1024 * 1024
    backlog = Backlog(RelaySettings(frame_backlog_bytes=4 * mib, total_backlog_bytes=8 * mib))
    backlog.weigh([0] * 10_000)
    assert backlog.frame_bytes == 4 * mib
    backlog.weigh([3 * mib] * 4 + [LEAST_BACKLOG_BYTES] * 1000)
    assert backlog.frame_bytes == 2 * mib
    backlog.weigh([3 * mib] * 1000)
    assert backlog.frame_bytes == LEAST_BACKLOG_BYTES
    backlog.weigh([])
    assert backlog.frame_bytes == 4 * mib


async def test_the_status_page_counts_them() -> None:
    async with (
        Relay(RelaySettings(port=0)) as running,
        aiohttp.ClientSession() as http,
        http.get(f"{running.url}/healthz") as response,
    ):
        health = await response.json()
    assert {"refused_connections", "refused_announcements", "slowed_s", "idle"} <= set(health)
