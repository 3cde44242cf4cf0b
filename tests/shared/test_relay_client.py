"""The connection to a relay comes back by itself, whatever the relay does, and tells all that it hears."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

import shared.relay_client
from relay.app import Relay
from relay.settings import RelaySettings
from shared.errors import ConnectionLost, ProtocolError, Refused, RelayUnreachable
from shared.identity import Identity
from shared.protocol import Challenge, Denied, Found, Gone, Signal, SignedRecord, Welcome, encode
from shared.relay_client import RelayClient, retry_delay
from tests.relay.parties import Party, announced, party, soon, until


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    async with Relay(RelaySettings(port=0)) as running:
        yield running


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.relay_client, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(shared.relay_client, "LONGEST_RETRY_S", 0.05)


def cut(client: RelayClient) -> None:
    """End the TCP connection under a client, as a router that restarts does."""
    assert client._link is not None
    connection = client._link._socket._response.connection
    assert connection is not None and connection.transport is not None
    connection.transport.abort()


# ---------------------------------------------------------------- coming back


async def test_a_cut_connection_comes_back_with_its_announcement_and_its_watches(relay: Relay) -> None:
    async with party(relay) as ann, party(relay) as bob:
        record = announced(ann.identity)
        await ann.client.announce(record)
        bob.watch()
        await bob.hears(record)
        assert await soon(bob.heard.states)

        cut(bob.client)
        assert not await soon(bob.heard.states)
        assert await soon(bob.heard.states)
        await bob.hears(record)

        cut(ann.client)
        assert await soon(bob.heard.gone) == ann.id
        await bob.hears(record)


async def test_a_relay_that_restarts_hears_everything_anew() -> None:
    ann, bob = Identity.generate(), Identity.generate()
    async with Relay(RelaySettings(port=0)) as relay:
        one, other = Party(relay.url, ann), Party(relay.url, bob)
        await one.client.__aenter__()
        await other.client.__aenter__()
        other.watch()
        record = announced(ann)
        await one.client.announce(record)
        await other.hears(record)
    try:
        assert not one.client.connected.is_set()
        async with Relay(RelaySettings(port=relay.port)):
            await other.hears(record)
            await one.client.wait_connected(5)
            await other.client.wait_connected(5)
            await one.client.send_frame(other.id, b"back again")
            assert await soon(other.heard.frames) == (ann.id, b"back again")
    finally:
        await one.client.__aexit__(None, None, None)
        await other.client.__aexit__(None, None, None)


async def test_an_announcement_made_while_away_is_told_on_return(relay: Relay) -> None:
    async with party(relay) as ann, party(relay) as bob:
        bob.watch()
        cut(ann.client)
        await until(lambda: not ann.client.connected.is_set())
        record = announced(ann.identity)
        await ann.client.announce(record)
        await bob.hears(record)


async def test_while_away_sending_says_so(relay: Relay) -> None:
    async with party(relay) as ann:
        cut(ann.client)
        await until(lambda: not ann.client.connected.is_set())
        with pytest.raises(ConnectionLost, match="not connected to the relay at"):
            await ann.client.send_frame(ann.id, b"")
        with pytest.raises(ConnectionLost):
            await ann.client.send_signal(Signal(ann.id, SignedRecord("", "0" * 128)))
        with pytest.raises(ConnectionLost):
            await ann.client.lookup()
        await ann.client.wait_connected(5)


async def test_waiting_for_a_relay_that_does_not_come_back_ends(relay: Relay) -> None:
    async with party(relay) as ann:
        await relay.__aexit__(None, None, None)
        await until(lambda: not ann.client.connected.is_set())
        with pytest.raises(RelayUnreachable, match="did not come back"):
            await ann.client.wait_connected(0.05)


async def test_a_patient_client_starts_before_its_relay() -> None:
    async with Relay(RelaySettings(port=0)) as relay:
        pass
    async with RelayClient(relay.url, Identity.generate(), patient=True) as client:
        assert not client.connected.is_set()
        async with Relay(RelaySettings(port=relay.port)):
            await client.wait_connected(5)


async def test_of_two_processes_with_one_key_the_older_one_stays_away_and_says_why(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    async with party(relay) as ann:
        older = ann.client
        async with RelayClient(relay.url, older.identity) as newer:
            await until(lambda: not older.connected.is_set())
            assert isinstance(older.error, Refused)
            assert newer.connected.is_set() and newer.error is None
    assert "end one of the two" in caplog.text


async def test_stun_is_where_the_relay_is(relay: Relay) -> None:
    async with party(relay) as ann:
        assert ann.client.stun == ("127.0.0.1", relay.stun_port)
        assert ann.client.address == "127.0.0.1"
    async with Relay(RelaySettings(port=0, stun=False)) as without, party(without) as ann:
        assert ann.client.stun is None


async def test_nothing_is_left_running(relay: Relay) -> None:
    before = asyncio.all_tasks()
    async with party(relay) as ann:
        await ann.client.lookup()
    await until(lambda: not asyncio.all_tasks() - before)


async def test_a_listener_that_fails_costs_the_others_nothing(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    async with party(relay) as ann:
        broken = RelayClient(relay.url, Identity.generate())

        def fail(*_: object) -> None:
            raise RuntimeError("a mistake")

        heard: asyncio.Queue[bytes] = asyncio.Queue()
        broken.on_frame(fail)
        broken.on_frame(lambda _, payload: heard.put_nowait(bytes(payload)))
        async with broken:
            await ann.client.send_frame(broken.identity.id, b"one")
            await ann.client.send_frame(broken.identity.id, b"two")
            assert [await soon(heard), await soon(heard)] == [b"one", b"two"]
    assert "a mistake" in caplog.text


async def test_a_sender_that_gives_up_does_not_disturb_the_others(relay: Relay) -> None:
    async with party(relay) as ann, party(relay) as bob:
        senders = [
            asyncio.create_task(ann.client.send_frame(bob.id, bytes([number]) * 60_000))
            for number in range(50)
        ]
        await asyncio.sleep(0)
        for sender in senders[10::3]:
            sender.cancel()
        outcomes = await asyncio.gather(*senders, return_exceptions=True)

        assert not [error for error in outcomes if isinstance(error, Exception)]
        arrived = [await soon(bob.heard.frames) for error in outcomes if error is None]
        sent = [number for number, error in enumerate(outcomes) if error is None]
        assert [payload[0] for _, payload in arrived] == sent


async def test_a_relay_that_reads_late_gets_every_frame_once_and_in_order() -> None:
    reads = asyncio.Event()
    came: asyncio.Queue[bytes] = asyncio.Queue()

    async def scene(socket: web.WebSocketResponse) -> None:
        await reads.wait()
        async for received in socket:
            came.put_nowait(received.data[-4:])

    async with pretended(scene) as url, RelayClient(url, Identity.generate()) as client:
        other = Identity.generate().id
        sent = [number.to_bytes(4, "big") for number in range(2000)]

        async def send() -> None:
            for number in sent:
                await client.send_frame(other, bytes(16 * 1024), number)

        sending = asyncio.create_task(send())
        link = client._link
        assert link is not None
        # Full: a frame whose writing began waits, and others wait behind it.
        await until(lambda: link._queued_bytes >= shared.relay_client.OUTGOING_BYTES)
        reads.set()
        async with asyncio.timeout(20):
            await sending
            assert [await came.get() for _ in sent] == sent


async def test_sending_waits_for_a_relay_that_does_not_read() -> None:
    asleep = asyncio.Event()

    async def never_read(_socket: web.WebSocketResponse) -> None:
        await asleep.wait()

    async with pretended(never_read) as url, RelayClient(url, Identity.generate()) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                while True:
                    await client.send_frame(client.identity.id, bytes(65536))
        assert client._link is not None
        assert client._link._queued_bytes < 3 * 65536
        asleep.set()


# ---------------------------------------------------------------- relays that misbehave

Scene = Callable[[web.WebSocketResponse], Awaitable[None]]


async def welcome(socket: web.WebSocketResponse) -> None:
    await socket.send_str(encode(Challenge(secrets.token_hex(32))).decode())
    await socket.receive()
    await socket.send_str(encode(Welcome(address="", stun_port=0)).decode())


@asynccontextmanager
async def pretended(scene: Scene, *, polite: bool = True) -> AsyncIterator[str]:
    """A relay that plays a scene with everyone who logs in, then reads until the other side has gone."""

    async def serve(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(timeout=0.2)
        await socket.prepare(request)
        if polite:
            await welcome(socket)
        await scene(socket)
        async for _ in socket:
            pass
        return socket

    app = web.Application()
    app.router.add_get("/ws", serve)
    runner = web.AppRunner(app, shutdown_timeout=0.2, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    "rubbish",
    [
        "",
        "{}",
        "[" * 50_000,
        '{"type":"found"}',
        '{"type":"gone","peer":"me"}',
        encode(Welcome(address="", stun_port=0)).decode(),
        encode(Challenge("0" * 64)).decode(),
        " " * 200_000,
        b"",
        bytes(31),
        bytes(200_000),
    ],
    ids=lambda rubbish: str(rubbish[:30]),
)
async def test_rubbish_from_a_relay_costs_a_reconnect_and_no_more(rubbish: str | bytes) -> None:
    visits = 0

    async def scene(socket: web.WebSocketResponse) -> None:
        nonlocal visits
        visits += 1
        if visits == 1:
            await (socket.send_str(rubbish) if isinstance(rubbish, str) else socket.send_bytes(rubbish))
        else:
            await socket.send_str(encode(Gone("0" * 64)).decode())

    async with pretended(scene) as url:
        one = Party(url)
        async with one.client:
            assert await soon(one.heard.gone) == "0" * 64
    assert visits == 2


@pytest.mark.parametrize(
    ("word", "error"),
    [
        (encode(Denied("go away", fatal=True)).decode(), Refused),
        (encode(Gone("0" * 64)).decode(), ProtocolError),
        ("hello", ProtocolError),
        (None, RelayUnreachable),
    ],
)
async def test_a_login_that_goes_wrong_is_told_to_whoever_connects(
    word: str | None, error: type[Exception]
) -> None:
    async def scene(socket: web.WebSocketResponse) -> None:
        if word is None:
            await socket.close()
        else:
            await socket.send_str(word)

    async with pretended(scene, polite=False) as url:
        with pytest.raises(error):
            async with RelayClient(url, Identity.generate()):
                pass


async def test_a_relay_that_never_finishes_the_login_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.relay_client, "LOGIN_TIMEOUT_S", 0.05)

    async def scene(_socket: web.WebSocketResponse) -> None:
        pass

    async with pretended(scene, polite=False) as url:
        with pytest.raises(RelayUnreachable, match="did not finish the login"):
            async with RelayClient(url, Identity.generate()):
                pass


async def test_an_address_where_no_relay_is_says_so(relay: Relay) -> None:
    with pytest.raises(RelayUnreachable, match="answers 404"):
        async with RelayClient(f"{relay.url}/elsewhere", Identity.generate()):
            pass
    async with aiohttp.ClientSession() as http, http.get(relay.url) as response:
        assert response.status == 200


async def test_a_lookup_ends_when_the_relay_goes_or_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang_up(socket: web.WebSocketResponse) -> None:
        await socket.receive()
        await socket.close()

    async def be_silent(_socket: web.WebSocketResponse) -> None:
        pass

    async with pretended(hang_up) as url, RelayClient(url, Identity.generate()) as client:
        with pytest.raises(ConnectionLost, match="went away"):
            await client.lookup()
    monkeypatch.setattr(shared.relay_client, "LOOKUP_TIMEOUT_S", 0.05)
    async with pretended(be_silent) as url, RelayClient(url, Identity.generate()) as client:
        with pytest.raises(ConnectionLost, match="did not answer a lookup"):
            await client.lookup()


async def test_a_lookup_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.relay_client, "MAX_FOUND_RECORDS", 100)
    record = SignedRecord("{}", "0" * 128)

    async def scene(socket: web.WebSocketResponse) -> None:
        await socket.receive()
        for _ in range(20):
            await socket.send_str(encode(Found(1, [record] * 10, more=True)).decode())

    async with pretended(scene) as url, RelayClient(url, Identity.generate()) as client:
        with pytest.raises(ConnectionLost):
            await client.lookup()


# ---------------------------------------------------------------- when to return


@settings(deadline=None)
@given(failures=st.integers(0, 10_000), chance=st.floats(0, 1, exclude_max=True))
def test_retries_are_spread_and_bounded(failures: int, chance: float) -> None:
    longest_s = shared.relay_client.LONGEST_RETRY_S
    assert 0 <= retry_delay(failures, 0.0, chance) <= longest_s
    assert 0.01 <= retry_delay(failures, 0.02, chance) <= 0.03
    assert retry_delay(failures, 1e12, chance) <= 1.5 * longest_s
