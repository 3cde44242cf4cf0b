"""`python -m peer doctor`: what it finds, what it advises, and what it keeps to itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peer.__main__ import app
from peer.doctor import Finding, ask_stun, examine, redact
from peer.settings import PeerSettings
from relay.app import Relay
from relay.settings import RelaySettings
from shared.channel import Listen
from tests.harness.models import save_random
from tests.harness.swarm import Swarm

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    async with Relay(RelaySettings(port=0)) as relay:
        yield relay


async def found(settings: PeerSettings) -> dict[str, Finding]:
    return {finding.what: finding async for finding in examine(settings)}


async def test_a_machine_that_is_well_is_said_to_be(relay: Relay) -> None:
    listen = Listen("127.0.0.1", advertise=(("203.0.113.7", 4001),))
    findings = await found(PeerSettings(relays=(relay.url,), device="cpu", listen=listen))

    assert list(findings) == ["device", "memory", "port", "relay", "UDP", "router", "peers"]
    assert findings["device"].says == "cpu, computes in float32"
    assert "GB are free" in findings["memory"].says
    assert findings["port"].says == "direct connections may come in at 203.0.113.7:4001"
    assert f"{relay.url} let us in after" in findings["relay"].says
    assert "sees this machine at 127.0.0.1:" in findings["UDP"].says
    assert findings["router"].says.startswith("none translates this machine's addresses")
    assert not any(finding.state == "broken" for finding in findings.values())


async def test_the_path_to_each_live_peer_is_told_in_words(tmp_path: Path) -> None:
    async with Swarm(save_random("llama", tmp_path), direct=False) as swarm:
        await swarm.start(ann=(0, 6))
        findings = await found(PeerSettings(relays=(swarm.relay.url,), device="cpu", listen=None))

    path = findings["path to ann"]
    assert path.state == "mind"
    assert path.says.startswith("relayed, ")
    assert "the other side wants no direct link" in path.says


async def test_a_port_that_nobody_could_reach_is_named() -> None:
    findings = await found(PeerSettings(relays=(NOWHERE,), device="cpu", listen=Listen("127.0.0.1")))

    assert findings["port"].state == "mind"
    assert "no address that another one could reach" in findings["port"].says


async def test_without_a_relay_the_rest_is_still_told() -> None:
    findings = await found(PeerSettings(relays=(NOWHERE,), device="cpu", listen=None))

    assert findings["relay"].state == "broken"
    assert "no relay answers" in findings["relay"].says
    assert findings["port"].says.startswith("none")
    assert "UDP" not in findings


async def test_each_relay_is_tried_and_one_is_enough_for_the_rest(relay: Relay) -> None:
    settings = PeerSettings(relays=(NOWHERE, relay.url), device="cpu", listen=None)
    findings = [finding async for finding in examine(settings)]

    assert [finding.state for finding in findings if finding.what == "relay"] == ["broken", "well"]
    assert findings[-1].what == "peers"


async def test_a_relay_without_stun_and_a_device_that_is_not_here_are_named() -> None:
    async with Relay(RelaySettings(port=0, stun=False)) as relay:
        findings = await found(PeerSettings(relays=(relay.url,), device="toaster", listen=None))

    assert findings["device"].state == "broken"
    assert "--device toaster is not on this machine" in findings["device"].says
    assert "answers no STUN" in findings["UDP"].says


async def test_silence_on_udp_is_an_error_and_rubbish_is_not_believed() -> None:
    class Rubbish(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(b"rubbish", addr)

        def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
            self.transport = transport

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Rubbish, local_addr=("127.0.0.1", 0))
    with pytest.raises(OSError, match="no answer"):
        await ask_stun(*transport.get_extra_info("sockname")[:2])
    transport.close()


@pytest.mark.parametrize(
    "address",
    [
        "http://relay.example:8787",
        "wss://relay.example/ws",
        "192.0.2.7:4001",
        "192.0.2.7",
        "[fd00::2]:4001",
        "2001:db8::1",
    ],
)
def test_addresses_are_not_told(address: str) -> None:
    assert redact(f"seen at {address}, and well") == "seen at (address), and well"
    assert redact("the host relay.example is away", ["relay.example"]) == "the host (address) is away"


def test_words_with_colons_and_dots_stay() -> None:
    words = "socket: its address does not answer; 12.5 ms there and back: layers 0:6 of 1.0.2"
    assert redact(words) == words


def invoke(*flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *flags], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def test_the_command_tells_no_address_unless_asked_and_ends_with_one_when_something_is_broken() -> None:
    status, told = invoke("--relay", "http://127.0.0.1:1", "--device", "cpu")
    assert status == 1
    assert "127.0.0.1" not in told

    status, told = invoke("--relay", "http://127.0.0.1:1", "--device", "cpu", "--show-addresses")
    assert status == 1
    assert "127.0.0.1:1" in told


def test_json_holds_the_same() -> None:
    _, told = invoke("--relay", NOWHERE, "--device", "cpu", "--listen", "off", "--json")
    findings = json.loads(told)

    assert [finding["what"] for finding in findings] == ["device", "memory", "port", "relay"]
    assert {"what", "state", "says", "todo"} == set(findings[0])


def test_flags_before_the_word_doctor_count_too() -> None:
    result = CliRunner().invoke(app, ["--relay", NOWHERE, "--device", "cpu", "doctor", "--show-addresses"])
    assert result.exit_code == 1
    assert NOWHERE in result.output.replace("\n", "")
