"""The STUN responder answers binding requests by RFC 8489, and stays silent for everything else."""

from __future__ import annotations

import asyncio
import socket
import struct

import aioice.stun
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.app import Relay
from relay.settings import RelaySettings
from relay.stun import answer, asks_other_port, stun_responders
from shared.errors import SettingsError

CHANGE_PORT = (0x0003, bytes((0, 0, 0, 2)))
REQUEST = bytes.fromhex("000100002112a442b7e7a701bc34d686fa87dfae")


def request(*attributes: tuple[int, bytes]) -> bytes:
    body = b"".join(struct.pack("!HH", kind, len(value)) + value for kind, value in attributes)
    return struct.pack("!HH", 1, len(body)) + REQUEST[4:] + body


def test_an_ipv4_address_as_in_rfc_5769() -> None:
    """The address of RFC 5769 §2.2, 192.0.2.1:32853, in the bytes that it gives."""
    response = answer(REQUEST, "192.0.2.1", 32853)
    assert response == bytes.fromhex("0101000c") + REQUEST[4:] + bytes.fromhex("002000080001a147e112a643")


def test_an_ipv6_address_as_in_rfc_5769() -> None:
    response = answer(REQUEST, "2001:db8:1234:5678:11:2233:4455:6677", 32853)
    assert response == bytes.fromhex("01010018") + REQUEST[4:] + bytes.fromhex(
        "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    )


def test_an_ipv4_address_seen_by_an_ipv6_socket() -> None:
    assert answer(REQUEST, "::ffff:192.0.2.1", 32853) == answer(REQUEST, "192.0.2.1", 32853)


def test_another_implementation_understands_the_answer() -> None:
    message = aioice.stun.Message(aioice.stun.Method.BINDING, aioice.stun.Class.REQUEST)
    message.attributes["USERNAME"] = "someone"
    response = aioice.stun.parse_message(answer(bytes(message), "fe80::1%eth0", 1) or b"")

    assert response.message_class is aioice.stun.Class.RESPONSE
    assert response.transaction_id == message.transaction_id
    assert response.attributes["XOR-MAPPED-ADDRESS"] == ("fe80::1", 1)


def test_an_attribute_that_must_be_understood_is_refused_by_name() -> None:
    response = aioice.stun.parse_message(answer(request((0x0003, bytes(4))), "192.0.2.1", 1) or b"")

    assert response.message_class is aioice.stun.Class.ERROR
    assert response.attributes["ERROR-CODE"] == (420, "Unknown Attribute")


def test_optional_attributes_are_passed_over() -> None:
    assert answer(request((0x8022, b"software")), "192.0.2.1", 1) == answer(REQUEST, "192.0.2.1", 1)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        REQUEST[:-1],
        REQUEST + b"\0",
        bytes.fromhex("0101") + REQUEST[2:],  # an answer
        bytes.fromhex("0011") + REQUEST[2:],  # an indication
        bytes.fromhex("4001") + REQUEST[2:],  # a TURN channel
        REQUEST[:4] + bytes(16),  # no magic cookie
        request((0x8022, b"x" * 2000)),
        REQUEST[:2] + b"\0\4" + REQUEST[4:] + b"\x80\x22\0\5",  # longer than it is
        REQUEST[:2] + b"\0\2" + REQUEST[4:] + b"\0\0",
    ],
)
def test_anything_else_gets_no_answer(packet: bytes) -> None:
    assert answer(packet, "192.0.2.1", 1) is None


@settings(deadline=None)
@given(st.binary(max_size=700))
def test_no_packet_is_answered_by_something_much_longer(packet: bytes) -> None:
    for data in (
        packet,
        REQUEST + packet,
        REQUEST[:2] + len(packet).to_bytes(2, "big") + REQUEST[4:] + packet,
    ):
        response = answer(data, "2001:db8::1", 65535)
        assert response is None or len(response) <= len(data) + 44


async def test_a_running_relay_tells_an_address_over_udp(relay: Relay) -> None:
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[bytes] = loop.create_future()

    class Asker(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            answered.set_result(data)

    transport, _ = await loop.create_datagram_endpoint(Asker, remote_addr=("127.0.0.1", relay.stun_port))
    try:
        for rubbish in (b"", b"hello", bytes(1400)):
            transport.sendto(rubbish)
        transport.sendto(REQUEST)
        response = aioice.stun.parse_message(await asyncio.wait_for(answered, 5))
        assert response.attributes["XOR-MAPPED-ADDRESS"] == transport.get_extra_info("sockname")
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("port", "from_second"), [("first", False), ("first", True), ("second", False), ("second", True)]
)
async def test_either_port_answers_for_the_other_when_asked_to(port: str, from_second: bool) -> None:
    asked = dict(zip(("first", "second"), (0, 1), strict=True))[port]
    async with stun_responders("127.0.0.1", 0, 0) as ports:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.setblocking(False)
            asker.bind(("127.0.0.1", 0))
            packet = request(CHANGE_PORT) if from_second != bool(asked) else REQUEST
            await asyncio.get_running_loop().sock_sendto(asker, packet, ("127.0.0.1", ports[asked]))
            async with asyncio.timeout(5):
                data, sender = await asyncio.get_running_loop().sock_recvfrom(asker, 2048)
            assert sender == ("127.0.0.1", ports[from_second])
            mapped = aioice.stun.parse_message(data).attributes["XOR-MAPPED-ADDRESS"]
            assert mapped == asker.getsockname()


def test_an_answer_from_another_host_is_not_to_be_had() -> None:
    change_host = request((0x0003, bytes((0, 0, 0, 4))))
    response = aioice.stun.parse_message(answer(change_host, "192.0.2.1", 1, two_ports=True) or b"")

    assert response.attributes["ERROR-CODE"] == (420, "Unknown Attribute")
    assert not asks_other_port(change_host)


@pytest.mark.parametrize("taken", [0, 1])
async def test_a_taken_port_is_told_with_a_sentence(taken: int) -> None:
    async with stun_responders("127.0.0.1", 0, 0) as ports:
        wanted = (ports[0], 0) if taken == 0 else (0, ports[0])
        with pytest.raises(SettingsError, match=f"cannot answer STUN on UDP 127.0.0.1:{ports[0]}"):
            async with stun_responders("127.0.0.1", *wanted):
                pass


async def test_stun_can_be_left_out() -> None:
    async with Relay(RelaySettings(port=0, stun=False)) as relay:
        assert relay.stun_port == 0
