"""Who may come in: holders of their own key, who dialled this very relay."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from relay.app import Relay
from relay.names import host_is_ours, origin_is_welcome, own_names
from relay.settings import RelaySettings
from shared.errors import RelayUnreachable, SettingsError
from shared.identity import Identity
from shared.protocol import Announce, Challenge, Gone, Login, Lookup
from shared.relay_client import RelayClient
from tests.relay.parties import announced, member, party, soon, stranger


async def test_a_participant_is_told_where_it_is_seen_and_where_stun_answers(relay: Relay) -> None:
    async with stranger(relay) as wire:
        await wire.login()
        welcome = await wire.welcomed()

    assert welcome.address == "127.0.0.1"
    assert welcome.stun_port == relay.stun_port > 0
    assert welcome.second_stun_port not in (0, welcome.stun_port)


async def test_a_login_with_somebody_elses_id_is_refused(relay: Relay) -> None:
    async with stranger(relay) as wire:
        challenge = await wire.hear()
        assert isinstance(challenge, Challenge)
        signature = wire.identity.sign("corolla-login-1", bytes.fromhex(challenge.nonce)).hex()
        await wire.say(Login(Identity.generate().id, signature))

        denied = await wire.denied()
        assert denied.fatal and "not signed by" in denied.reason
        assert await wire.ended() == aiohttp.WSCloseCode.POLICY_VIOLATION


async def test_a_login_meant_for_another_relay_is_refused(relay: Relay) -> None:
    async with stranger(relay) as wire:
        await wire.login(host="relay.example.org")

        assert "not signed by" in (await wire.denied()).reason


async def test_a_login_cannot_be_repeated(relay: Relay) -> None:
    async with stranger(relay) as first:
        challenge = await first.hear()
        assert isinstance(challenge, Challenge)
        payload = bytes.fromhex(challenge.nonce) + b"\0" + first.host.encode()
        login = Login(first.identity.id, first.identity.sign("corolla-login-1", payload).hex())
        await first.say(login)
        await first.welcomed()
        async with stranger(relay) as second:
            await second.hear()
            await second.say(login)

            assert (await second.denied()).fatal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "{}",
        "[]",
        '{"type":"login"}',
        '{"type":"login","peer":"00","signature":"00"}',
        '{"type":"nobody"}',
        "[" * 5000,
    ],
)
async def test_rubbish_instead_of_a_login_ends_the_connection_with_a_sentence(
    relay: Relay, text: str
) -> None:
    async with stranger(relay) as wire:
        await wire.hear()
        await wire.socket.send_str(text)

        denied = await wire.denied()
        assert denied.fatal and denied.reason
        assert await wire.ended() == aiohttp.WSCloseCode.POLICY_VIOLATION


async def test_nothing_is_answered_before_the_login(relay: Relay) -> None:
    async with stranger(relay) as wire:
        await wire.hear()
        await wire.say(Lookup(request=1))

        assert "log in first" in (await wire.denied()).reason


async def test_a_frame_before_the_login_ends_the_connection(relay: Relay) -> None:
    async with stranger(relay) as wire:
        await wire.hear()
        await wire.socket.send_bytes(bytes(64))

        assert "log in first" in (await wire.denied()).reason


async def test_another_version_of_the_protocol_is_named(relay: Relay) -> None:
    async with stranger(relay) as wire:
        await wire.hear()
        await wire.say(Login(wire.identity.id, "0" * 128, version=2))

        assert "version 1" in (await wire.denied()).reason


async def test_who_never_logs_in_is_sent_away() -> None:
    async with Relay(RelaySettings(port=0, login_deadline_s=0.05)) as relay, stranger(relay) as wire:
        await wire.hear()

        assert "no login" in (await wire.denied()).reason
        await wire.ended()


async def test_a_second_login_replaces_the_first(relay: Relay) -> None:
    identity = Identity.generate()
    async with party(relay) as friend, member(relay, identity) as first:
        await friend.client.announce(announced(friend.identity))
        await first.socket.send_bytes(bytes.fromhex(friend.id) + b"hi")
        await soon(friend.heard.frames)
        async with member(relay, identity) as second:
            denied = await first.denied()
            assert denied.fatal and "logged in again" in denied.reason
            await first.ended()
            assert await soon(friend.heard.gone) == identity.id  # what was on its way is lost

            await friend.client.send_frame(identity.id, b"to the second")
            received = await second.socket.receive()
            assert received.data[32:] == b"to the second"


async def test_logging_in_twice_on_one_connection_is_refused(relay: Relay) -> None:
    async with member(relay) as wire:
        await wire.say(Login(wire.identity.id, "0" * 128))

        denied = await wire.denied()
        assert "already" in denied.reason and not denied.fatal


async def test_a_full_relay_says_so() -> None:
    async with Relay(RelaySettings(port=0, max_participants=1)) as relay, party(relay):
        with pytest.raises(RelayUnreachable, match="full"):
            async with RelayClient(relay.url, Identity.generate()):
                pass


async def test_pages_of_other_origins_may_not_connect() -> None:
    settings = RelaySettings(port=0, origins=("https://chat.example.org",))
    async with Relay(settings) as relay:
        for origin in ("https://evil.test", "null", relay.url + "0", "not an origin"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                async with stranger(relay, Origin=origin):
                    pass
            assert refusal.value.status == 403
        for origin in (relay.url, "https://chat.example.org"):
            async with stranger(relay, Origin=origin) as wire:
                await wire.login()
                await wire.welcomed()


async def test_other_host_names_are_not_served(relay: Relay) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        async with stranger(relay, Host="evil.test"):
            pass
    assert refusal.value.status == 421
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{relay.url}/api/swarm", headers={"Host": "evil.test"}) as response,
    ):
        assert response.status == 421


async def test_a_login_through_a_proxy_is_bound_to_the_public_name() -> None:
    async with (
        Relay(RelaySettings(port=0, names=("relay.example.org",))) as relay,
        stranger(relay, Host="relay.example.org") as wire,
    ):
        await wire.login()
        await wire.welcomed()


async def test_after_many_bad_logins_the_others_are_still_served(relay: Relay) -> None:
    async with party(relay) as friend:
        for _ in range(20):
            async with stranger(relay) as wire:
                await wire.login(host="elsewhere")
                await wire.denied()
        await friend.client.announce(announced(friend.identity))

        assert len(await friend.client.lookup()) == 1


async def test_a_client_that_cannot_reach_a_relay_says_what_to_check() -> None:
    with pytest.raises(RelayUnreachable, match=r"no relay answers at http://127.0.0.1:1: check the address"):
        async with RelayClient("http://127.0.0.1:1", Identity.generate()):
            pass


def test_an_address_that_is_none_is_refused() -> None:
    for url in ("relay.example.org", "ftp://relay", "http://", "http://host:99999", "http://me:secret@host"):
        with pytest.raises(SettingsError):
            RelayClient(url, Identity.generate())


def test_a_relay_knows_its_names() -> None:
    local = own_names(RelaySettings())
    assert host_is_ours("localhost:8787", local) and host_is_ours("[::1]:80", local)
    assert not host_is_ours("evil.test", local) and not host_is_ours("a b", local)
    assert own_names(RelaySettings(host="0.0.0.0")) is None
    on_lan = own_names(RelaySettings(host="10.0.0.5"))
    assert host_is_ours("10.0.0.5:8787", on_lan) and not host_is_ours("localhost", on_lan)
    named = own_names(RelaySettings(host="0.0.0.0", names=("Relay.Example.org",)))
    assert host_is_ours("relay.example.org", named) and not host_is_ours("10.0.0.5", named)


def test_origins() -> None:
    assert origin_is_welcome(None, "host:1", ())
    assert origin_is_welcome("http://host:1", "host:1", ())
    assert origin_is_welcome("https://host", "host", ())
    assert not origin_is_welcome("http://host:2", "host:1", ())
    assert not origin_is_welcome("http://host.evil", "host", ())


async def test_a_participant_that_is_not_there_is_told_as_gone(relay: Relay) -> None:
    nobody = Identity.generate().id
    async with member(relay) as wire:
        await wire.socket.send_bytes(bytes.fromhex(nobody) + b"hello")

        assert await wire.hear() == Gone(nobody)


async def test_one_may_announce_only_for_oneself(relay: Relay) -> None:
    async with member(relay) as wire:
        await wire.say(Announce(announced(Identity.generate())))

        denied = await wire.denied()
        assert "only for itself" in denied.reason and not denied.fatal
        await asyncio.sleep(0)
        assert len(relay.meeting.registry) == 0
