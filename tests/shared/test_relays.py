"""Several relays as one: which is home, and what happens while some of them are away."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

import shared.relay_client
import shared.relays
from relay.app import Relay
from relay.settings import RelaySettings
from shared.errors import RelayUnreachable, SettingsError
from shared.identity import Identity
from shared.relay_client import RelayClient
from shared.relays import Relays
from shared.settings import DEFAULT_RELAY, relay_urls
from tests.relay.parties import announced, soon, until
from tests.shared.test_relay_client import pretended

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.relay_client, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(shared.relay_client, "LONGEST_RETRY_S", 0.05)


def here() -> Relay:
    return Relay(RelaySettings(port=0, stun=False))


async def found_at(relay: Relay) -> list[str]:
    async with RelayClient(relay.url, Identity.generate()) as client:
        return [record.body for record in await client.lookup()]


async def test_an_announcement_is_made_on_every_relay() -> None:
    ann = Identity.generate()
    async with here() as one, here() as other, Relays([one.url, other.url], ann) as relays:
        for client in relays:
            await client.wait_connected(5)
        record = announced(ann)
        await relays.announce(record)
        for relay in (one, other):
            await until(lambda relay=relay: len(relay.meeting.registry) == 1)  # type: ignore[misc]
            assert await found_at(relay) == [record.body]


async def test_a_relay_that_comes_late_hears_what_was_announced_without_it() -> None:
    ann = Identity.generate()
    async with here() as late:
        pass
    async with here() as one, Relays([late.url, one.url], ann) as relays:
        await relays.announce(announced(ann))
        async with Relay(RelaySettings(port=late.port, stun=False)) as back:
            await until(lambda: len(back.meeting.registry) == 1)


async def test_one_relay_that_answers_is_enough_to_begin() -> None:
    async with here() as one, Relays([NOWHERE, one.url], Identity.generate()) as relays:
        assert relays.home.url == one.url
        assert relays.connected_urls == [one.url]


async def test_when_none_answers_each_is_named() -> None:
    with pytest.raises(RelayUnreachable) as error:
        async with Relays([NOWHERE, "http://127.0.0.1:2"], Identity.generate()):
            pass
    assert "none of the 2 relays lets us in" in str(error.value)
    assert NOWHERE in str(error.value) and "http://127.0.0.1:2" in str(error.value)


async def test_home_is_the_relay_that_answers_fastest() -> None:
    async with here() as one, here() as other, Relays([one.url, other.url], Identity.generate()) as relays:
        slow, fast = relays.clients
        for client in (slow, fast):
            await client.wait_connected(5)
            assert client.login_ms is not None and client.login_ms > 0
        slow.login_ms, fast.login_ms = 80.0, 20.0
        assert relays.home is fast
        assert relays.connected_urls == [fast.url, slow.url]
        await other.__aexit__(None, None, None)
        await until(lambda: not fast.connected.is_set())
        assert relays.home is slow


async def test_a_relay_that_never_reads_does_not_keep_the_others_from_hearing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared.relays, "ANNOUNCE_TIMEOUT_S", 0.1)
    asleep = asyncio.Event()

    async def never_read(_socket: web.WebSocketResponse) -> None:
        await asleep.wait()

    ann = Identity.generate()
    async with pretended(never_read) as url, here() as one, Relays([url, one.url], ann) as relays:
        stuck = relays.clients[0]
        await stuck.wait_connected(5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    await stuck.send_frame(ann.id, bytes(65536))
        await relays.announce(announced(ann))
        await until(lambda: len(one.meeting.registry) == 1)
        asleep.set()


async def test_frames_and_signals_reach_the_dialer_from_each() -> None:
    ann, bob = Identity.generate(), Identity.generate()
    async with here() as one, here() as other, Relays([one.url, other.url], ann) as relays:
        heard: asyncio.Queue[bytes] = asyncio.Queue()
        for client in relays:
            await client.wait_connected(5)
            client.on_frame(lambda _, payload: heard.put_nowait(bytes(payload)))
        for relay in (one, other):
            async with RelayClient(relay.url, bob) as friend:
                await friend.send_frame(ann.id, relay.url.encode())
                assert await soon(heard) == relay.url.encode()


def test_relays_may_be_given_one_by_one_or_with_commas() -> None:
    assert relay_urls(None) == relay_urls([]) == relay_urls([" , "]) == (DEFAULT_RELAY,)
    assert relay_urls(["http://a:1", "http://b:2, wss://c"]) == ("http://a:1", "http://b:2", "wss://c")
    assert relay_urls(["http://a:1", "http://a:1/"]) == ("http://a:1/",)
    with pytest.raises(SettingsError, match="ftp://a"):
        relay_urls(["http://a:1", "ftp://a"])
    with pytest.raises(SettingsError, match="5 relays are too many: name 4 at most"):
        relay_urls([f"http://a:{number}" for number in range(1, 6)])
    with pytest.raises(SettingsError, match="200 letters at most"):
        relay_urls(["http://a/" + "x" * 200])
