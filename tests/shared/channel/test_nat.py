"""What a router does is judged by a relay's two ports, and an attempt is left out only when it is in vain."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
from aioice.stun import Class, Message, Method, parse_message

from relay.app import Relay
from relay.settings import RelaySettings
from shared.channel import nat, upgrade
from shared.channel.nat import Address, hopeless, judge, look
from shared.protocol import Describe, NatKind
from tests.shared.channel.ends import both_direct, ends, until

KINDS: tuple[NatKind, ...] = get_args(NatKind)
OURS = ("198.51.100.7", 4000)
OTHER_PORT = ("198.51.100.7", 4001)


@pytest.mark.parametrize(
    ("first", "second", "heard_stranger", "kind"),
    [
        (None, None, False, "blocked"),
        (OURS, None, True, "unknown"),
        (None, OURS, True, "unknown"),
        (OURS, OTHER_PORT, False, "symmetric"),
        (OURS, OTHER_PORT, True, "symmetric"),
        (OURS, OURS, False, "restricted"),
        (OURS, OURS, True, "open"),
        (("203.0.113.1", 4000), ("203.0.113.1", 4000), True, "cone"),
    ],
)
def test_a_kind_is_what_two_ports_see(
    first: Address | None, second: Address | None, heard_stranger: bool, kind: NatKind
) -> None:
    assert judge(OURS[0], first, second, heard_stranger=heard_stranger) == kind


# ---------------------------------------------------------------- asking


async def test_a_relay_shows_that_nothing_is_in_between() -> None:
    async with Relay(RelaySettings(port=0)) as relay:
        assert await look("127.0.0.1", *relay.meeting.stun_ports) == "open"


async def test_silence_is_taken_for_a_network_without_udp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nat, "PAUSES_S", (0.01, 0.01))
    with deaf_port() as one, deaf_port() as two:
        assert await look("127.0.0.1", one, two) == "blocked"


async def test_a_relay_with_one_port_closed_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nat, "PAUSES_S", (0.01, 0.01))
    async with Relay(RelaySettings(port=0)) as relay:
        with deaf_port() as closed:
            assert await look("127.0.0.1", relay.stun_port, closed) == "unknown"


async def test_a_relay_that_cannot_be_found_shows_nothing() -> None:
    assert await look("no-such-host.invalid", 1, 2) == "unknown"


async def test_answers_from_elsewhere_count_for_nothing() -> None:
    question = nat.Question(("127.0.0.1", 1), ("127.0.0.1", 2))
    with nat._asking("127.0.0.1", question) as asker:
        answer = Message(Method.BINDING, Class.RESPONSE, asker._requests[0].transaction_id)
        answer.attributes["XOR-MAPPED-ADDRESS"] = OURS
        asker._answered(parse_message(bytes(answer)), ("127.0.0.1", 1))
        assert not asker.complete.is_set()
        asker._answered(Message(Method.BINDING, Class.RESPONSE), ("127.0.0.1", 2))
        assert not asker.complete.is_set()
        asker._answered(parse_message(bytes(answer)), ("127.0.0.1", 2))
        assert asker.complete.is_set() and asker.answers == [OURS]


@contextmanager
def deaf_port() -> Iterator[int]:
    """A UDP port where nobody answers, nor the system for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


# ---------------------------------------------------------------- judging a pair


def side(nat: NatKind, seen: str, *hosts: str) -> Describe:
    candidates = [f"abc 1 udp 2130706431 {host} 5000 typ host" for host in hosts]
    candidates.append(f"abd 1 udp 1694498815 {seen or '192.0.2.1'} 5000 typ srflx raddr 10.0.0.1 rport 5000")
    return Describe(
        attempt=1, ufrag="", password="", fingerprint="", candidates=candidates, nat=nat, seen=seen
    )


IN_VAIN = {
    frozenset(("symmetric",)),
    frozenset(("symmetric", "restricted")),
    *(frozenset(("blocked", kind)) for kind in ("open", "cone", "restricted", "symmetric")),
}


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_only_pairs_that_cannot_meet_are_left_alone_and_both_sides_agree(
    one: NatKind, other: NatKind
) -> None:
    ann, bob = side(one, "203.0.113.1", "10.0.1.5"), side(other, "203.0.113.9", "10.0.2.5")
    assert bool(hopeless(ann, bob)) == bool(hopeless(bob, ann)) == (frozenset((one, other)) in IN_VAIN)


def test_the_reason_tells_the_sides_apart() -> None:
    ann, bob = side("symmetric", "203.0.113.1", "10.0.1.5"), side("restricted", "203.0.113.9", "10.0.2.5")
    assert hopeless(ann, bob).startswith("this side's router uses another public port")
    assert hopeless(bob, ann).startswith("the other side's router uses another public port")
    blocked = side("blocked", "203.0.113.9")
    assert hopeless(ann, blocked) == "the other side's network lets no UDP through"
    assert hopeless(blocked, ann) == "this side's network lets no UDP through"


@pytest.mark.parametrize(
    ("ann", "bob"),
    [
        pytest.param(("203.0.113.1", "10.0.1.5"), ("203.0.113.1", "10.0.2.5"), id="one router"),
        pytest.param(("", "10.0.1.5"), ("203.0.113.1", "10.0.2.5"), id="seen by nobody"),
        pytest.param(("2001:db8::1", "10.0.1.5"), ("2001:db8:1::1", "10.0.2.5"), id="seen by IPv6"),
        pytest.param(
            ("203.0.113.1", "10.0.1.5", "10.8.0.2"), ("203.0.113.9", "10.0.2.5", "10.8.0.3"), id="a VPN"
        ),
        pytest.param(("203.0.113.1", "100.64.0.1"), ("203.0.113.9", "100.100.1.2"), id="a mesh"),
        pytest.param(("203.0.113.1", "2001:db8::5"), ("203.0.113.9", "2001:db8:1::5"), id="IPv6"),
    ],
)
def test_possible_neighbours_try(ann: tuple[str, ...], bob: tuple[str, ...]) -> None:
    assert hopeless(side("symmetric", *ann), side("symmetric", *bob)) == ""


def test_the_bridge_that_every_machine_has_makes_no_neighbours() -> None:
    ann = side("symmetric", "203.0.113.1", "10.0.1.5", "172.17.0.1")
    bob = side("symmetric", "203.0.113.9", "10.0.2.5", "172.17.0.1")
    assert hopeless(ann, bob)


@pytest.mark.parametrize(
    "text", ["", "typ host", "a b c d e f typ host", "a 1 udp 1 printer.local 1 typ host"]
)
def test_a_candidate_that_makes_no_sense_changes_nothing(text: str) -> None:
    ann = side("symmetric", "203.0.113.1", "10.0.1.5")
    ann.candidates.append(text)
    assert hopeless(ann, side("symmetric", "203.0.113.9", "10.0.2.5"))


# ---------------------------------------------------------------- in a channel


async def test_a_hopeless_attempt_is_not_made_and_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "hopeless", lambda own, other: "the sea lies between them")
    async with ends() as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        assert channel.why_relayed == upgrade.OPENING
        await until(lambda: channel.why_relayed == "the sea lies between them")
        await until(lambda: bob.channel_to(ann).why_relayed == "the sea lies between them")
        assert channel.path == "relayed"


async def test_a_direct_channel_needs_no_excuse() -> None:
    async with ends() as (ann, bob):
        channel = await both_direct(ann, bob)
        assert channel.why_relayed == ""
        assert ann.dialer.nat == "open"


async def test_who_wants_no_direct_links_says_so() -> None:
    async with ends(direct=False) as (ann, bob):
        channel = await ann.dialer.channel(bob.id)
        await until(lambda: channel.why_relayed == "this side wants no direct links")
