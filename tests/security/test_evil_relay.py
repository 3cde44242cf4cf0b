"""Relays that mean harm, row by row of the threat table in docs/security.md.

What they do to greetings and frames stands in tests/shared/channel/test_evil_relay.py; here are whole swarms,
and the connection to the relay itself.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

import shared.channel.dialer
from relay.app import Relay
from relay.registry import entry_of
from shared.announcement import DOMAIN, read_announcement, sign_announcement
from shared.channel.sealed import GREETING_DOMAIN
from shared.errors import BadSignature, RelayUnreachable
from shared.identity import Identity, PeerId, verify
from shared.protocol import Announcement, Found, Gone, SignedRecord, decode, encode
from shared.relay_client import LOGIN_DOMAIN, RelayClient
from tests.harness.swarm import Swarm, tokens
from tests.relay.parties import Party, announced, soon
from tests.shared.test_relay_client import pretended

PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]
OFFERED_BYTES = 64 << 20
"""Far more than two systems hold of a connection that one side has left."""


# ---------------------------------------------------------------- row 1: it invents, withholds and replays


async def test_row_1_peers_that_a_relay_invents_are_passed_over(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are announced under good signatures, as better than any true peer; greetings to them vanish."""
    monkeypatch.setattr(shared.channel.dialer, "DIAL_TIMEOUT_S", 0.2)
    async with Swarm(llama, relay_count=2, direct=False) as swarm:
        evil = swarm.relays[0]
        await swarm.start(ann=(0, 3), bob=(3, 6))
        true = next(live for live in swarm.client.directory.live() if live.start == 0)
        invented = [invent(evil, true) for _ in range(3)]
        await swarm.until(lambda: len(swarm.client.directory.live()) == 5)
        swallow(evil)

        answer = [event async for event in swarm.ask(PROMPT, new=5)]

        assert tokens(answer) == swarm.reference(PROMPT, new=5)
        assert not {PeerId(peer) for peer in invented} & set(swarm.client.links())


def invent(relay: Relay, like: Announcement) -> str:
    """A key that nobody sits behind, with all layers and all the memory one could wish for."""
    identity = Identity.generate()
    fields = {name: getattr(like, name) for name in like.__struct_fields__}
    fields |= {"peer": identity.id, "name": "nobody", "start": 0, "end": like.layer_count}
    record = sign_announcement(identity, Announcement(**fields | {"ms_per_layer": 0.001}))
    now = time.time()
    entry = entry_of(record, read_announcement(record, now), now)
    relay.meeting.registry.accept(entry)
    relay.meeting._tell_soon(entry)
    return identity.id


def swallow(relay: Relay) -> None:
    """Signals to those who are not there vanish without a word."""
    nobody = relay.meeting.participants.get

    def vanish(message: object) -> None:
        pass

    class Nobody:
        send = staticmethod(vanish)

        def __init__(self, peer: PeerId) -> None:
            self.peer = peer
            self.contacts: dict[PeerId, None] = {}

    relay.meeting.participants.get = lambda peer: nobody(peer) or Nobody(peer)  # type: ignore[method-assign, assignment, return-value]


async def test_row_1_a_record_that_a_relay_altered_or_aged_changes_nothing(llama: Path) -> None:
    async with Swarm(llama, relay_count=2) as swarm:
        await swarm.start(ann=(0, 6))
        [before] = swarm.client.directory.live()
        evil = swarm.relays[0].meeting
        old = evil.registry.get(PeerId(before.peer))
        assert old is not None
        await swarm.peers["ann"].announce("serving")
        await swarm.until(lambda: swarm.client.directory.live()[0].sequence > before.sequence)
        [newest] = swarm.client.directory.live()

        liar = evil.participants.get(swarm.client.identity.id)
        assert liar is not None
        forged = SignedRecord(
            old.record.body.replace('"end":6', '"end":3').replace(str(old.announcement.sequence), "9" * 13),
            old.record.signature,
        )
        heard = asyncio.Event()
        swarm.client.relays.clients[0].on_gone(lambda _: heard.set())
        liar.send(Found(0, [old.record, forged]))
        liar.send(Gone("0" * 64))
        await asyncio.wait_for(heard.wait(), 5)

        assert swarm.client.directory.live() == [newest]


# ---------------------------------------------------------------- row 15: it floods its clients


@pytest.mark.parametrize(
    "rubbish",
    [b"\xff" * 64, b"\x83\x04abcd", b"\x81\x7f" + b"\xff" * 8],
    ids=["no opcode", "control", "endless"],
)
async def test_row_15_after_bytes_that_are_no_websocket_a_client_takes_in_no_more(
    rubbish: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp's reader keeps what comes after an error (its issue 13655); so the connection has to end."""
    monkeypatch.setattr("shared.relay_client.LONGEST_RETRY_S", 0.01)
    poured: asyncio.Queue[int] = asyncio.Queue()

    async def scene(socket: web.WebSocketResponse) -> None:
        request = socket._req
        assert request is not None and request.transport is not None
        transport = request.transport
        transport.write(rubbish)
        sent = 0
        try:
            while not transport.is_closing() and sent < OFFERED_BYTES:
                transport.write(bytes(65536))
                sent += 65536
                while transport.get_write_buffer_size() and not transport.is_closing():  # noqa: ASYNC110
                    await asyncio.sleep(0)
        finally:
            poured.put_nowait(sent)  # also when the client hung up, which cancels this
            transport.abort()

    async with pretended(scene) as url, RelayClient(url, Identity.generate()):
        # And it comes back for more.
        assert max([await soon(poured), await soon(poured)]) < OFFERED_BYTES


async def test_row_15_a_relay_that_never_stops_talking_is_heard_and_nothing_piles_up() -> None:
    """A client reads on whatever comes, and keeps none of what it did not ask for."""
    record = announced(Identity.generate())
    word = encode(Found(7, [record] * 20)).decode()

    async def scene(socket: web.WebSocketResponse) -> None:
        for _ in range(300):
            await socket.send_str(word)
        await socket.send_str(encode(Gone("0" * 64)).decode())

    async with pretended(scene) as url:
        one = Party(url)
        async with one.client:
            assert await soon(one.heard.gone) == "0" * 64
            assert one.heard.records.empty() and one.client._lookups == {}


# ---------------------------------------------------------------- row 19: it is not the one that was named


async def test_row_19_a_relay_whose_certificate_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    """As when somebody on the line answers in the place of https://relay.example.org."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own_certificate(tmp_path / "relay.pem"))
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(RelayUnreachable, match="certificate"):
            async with RelayClient(f"https://127.0.0.1:{port}", Identity.generate()):
                pass
    assert b"G" not in heard  # not even the request


def own_certificate(file: Path) -> Path:
    """For 127.0.0.1, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(pem + certificate.public_bytes(Encoding.PEM))
    return file


# ---------------------------------------------------------------- row 20: it uses a signature elsewhere


DOMAINS = [LOGIN_DOMAIN, DOMAIN, GREETING_DOMAIN]


def test_row_20_a_signature_for_one_purpose_is_worth_nothing_for_another() -> None:
    ann = Identity.generate()
    assert len(set(DOMAINS)) == 3
    for made_for in DOMAINS:
        signature = ann.sign(made_for, b"the same bytes")
        for used_for in DOMAINS:
            if used_for == made_for:
                verify(ann.id, used_for, b"the same bytes", signature)
            else:
                with pytest.raises(BadSignature):
                    verify(ann.id, used_for, b"the same bytes", signature)


async def test_row_20_a_relay_cannot_have_an_announcement_signed_as_a_login() -> None:
    """It hands out a nonce that is the start of an announcement; what it gets back verifies as none."""
    ann = Identity.generate()
    wanted = announced(ann).body.encode()
    signatures: list[str] = []

    async def scene(socket: web.WebSocketResponse) -> None:
        await socket.send_str(f'{{"type":"challenge","nonce":"{wanted[:32].hex()}"}}')
        signatures.append((await socket.receive_json())["signature"])
        await socket.close()

    async with pretended(scene, polite=False) as url:
        with pytest.raises(Exception, match="hung up"):
            async with RelayClient(url, ann):
                pass
    for body in (wanted, wanted[:32]):
        with pytest.raises(BadSignature):
            verify(ann.id, DOMAIN, body, bytes.fromhex(signatures[0]))


def test_row_20_an_announcement_is_believed_for_its_lease_and_no_longer() -> None:
    now = time.time()
    record = announced(Identity.generate(), now)
    assert read_announcement(record, now + 44) == decode(record.body, Announcement)
    with pytest.raises(Exception, match="expired"):
        read_announcement(record, now + 46)
