"""Addresses of a home are for neighbours alone (threat row 17)."""

from __future__ import annotations

import ipaddress

import pytest

from shared.channel.addresses import neighbours, public_candidates, public_interfaces
from shared.identity import Identity
from tests.harness.evil_relay import EvilRelay
from tests.shared.channel.ends import End, until


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        ("203.0.113.7", "203.0.113.7", True),
        ("203.0.113.7", "198.51.100.4", False),
        ("203.0.113.7", "", False),
        ("203.0.113.7", "2001:db8::1", False),
        ("2001:db8:0:1::5", "2001:db8:0:1::6", True),
        ("2001:db8:0:1::5", "2001:db8:0:2::6", False),
        ("192.168.1.5", "203.0.113.7", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("", "203.0.113.7", True),
        ("203.0.113.7", "not an address", False),
    ],
)
def test_neighbours_are_seen_by_one_public_address(own: str, theirs: str, expected: bool) -> None:
    assert neighbours(own, theirs) is expected


def test_candidates_for_strangers_say_nothing_of_the_home() -> None:
    told = public_candidates(
        [
            "1 1 udp 2130706431 192.168.1.5 5000 typ host",
            "2 1 udp 2130706431 fd12::5 5000 typ host",
            "3 1 udp 2130706431 2001:db8::5 5000 typ host",
            "4 1 udp 1694498815 203.0.113.7 6000 typ srflx raddr 192.168.1.5 rport 5000",
            "5 1 udp 2130706431 100.64.0.9 5000 typ host",
        ]
    )

    assert told == [
        "1 1 udp 2130706431 0.0.0.0 9 typ host",
        "2 1 udp 2130706431 0.0.0.0 9 typ host",
        "3 1 udp 2130706431 2001:db8::5 5000 typ host",
        "4 1 udp 1694498815 203.0.113.7 6000 typ srflx raddr 0.0.0.0 rport 9",
        "5 1 udp 2130706431 100.64.0.9 5000 typ host",
    ]


def test_networks_of_a_home_are_left_out_for_strangers() -> None:
    ours = [ipaddress.ip_interface(text) for text in ("10.1.2.3/8", "172.20.0.1/16", "203.0.113.7/24")]

    assert public_interfaces(ours) == {ours[2]}


async def test_two_in_different_homes_tell_each_other_no_address_of_their_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_home = frozenset({ipaddress.ip_interface("192.168.1.5/24")})
    monkeypatch.setattr("shared.channel.dialer.local_interfaces", lambda: at_home)
    relay = EvilRelay()
    ann, bob = (
        End(identity, relay.connect(identity)) for identity in (Identity.generate(), Identity.generate())
    )
    relay.connections[ann.id].address = "203.0.113.7"
    relay.connections[bob.id].address = "198.51.100.4"
    async with ann.dialer, bob.dialer:
        channel = await ann.dialer.channel(bob.id)
        await until(lambda: ann.id in bob.dialer.channels and channel._upgrade._remote is not None)
        described = channel._upgrade._remote, bob.channel_to(ann)._upgrade._remote
        await until(lambda: bob.channel_to(ann)._upgrade._remote is not None)

        for description in described:
            assert description is not None and description.candidates
            assert not any("192.168" in candidate for candidate in description.candidates)
