"""From any home to any home: at once by the relay, and directly wherever two routers let that happen.

How soon is for `bench.nat`: on a busy machine no time decides anything here.
"""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Literal

import pytest

from shared.protocol import NatKind
from tests.nat.conftest import Pair, people
from tests.nat.lab import KINDS, Kind, Lab
from tests.nat.participant import Participant, met

# The participants' processes are shared, and with them the loop that talks to them.
pytestmark = pytest.mark.asyncio(loop_scope="package")

SHOWN_AS: dict[Kind, NatKind] = {
    "none": "open",
    "firewall": "restricted",
    "fullcone": "cone",
    "cone": "restricted",
    "symmetric": "symmetric",
    "udpblocked": "blocked",
}
STRICT = {"firewall", "cone", "symmetric"}


def can_be_direct(one: Kind, other: Kind) -> bool:
    """A port that changes with the destination meets only those who let strangers in."""
    if "udpblocked" in (one, other):
        return False
    return "symmetric" not in (one, other) or not {one, other} <= STRICT


DIRECT = [pair for pair in product(KINDS, KINDS) if can_be_direct(*pair)]
# Both blocked looks like a relay whose STUN is silent: that is tried. The other orders would take too long.
IN_VAIN = [
    (one, other)
    for one, other in product(KINDS, KINDS)
    if not can_be_direct(one, other) and other != "udpblocked"
]


@pytest.mark.parametrize(("one", "other"), DIRECT)
async def test_two_homes_chat_at_once_and_become_direct(lab: Lab, pair: Pair, one: Kind, other: Kind) -> None:
    lab.left.router.become(one)
    lab.right.router.become(other)
    await chat_and_become_direct(lab, *pair, f"{one} - {other}")


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), IN_VAIN)
async def test_two_homes_without_a_way_know_it_and_stay_on_the_relay(
    lab: Lab, pair: Pair, one: Kind, other: Kind
) -> None:
    lab.left.router.become(one)
    lab.right.router.become(other)
    ann, bob = pair
    async with met(ann, bob, lab.relay_url):
        shown = await asyncio.gather(ann.look(), bob.look())
        assert (shown[0], shown[1]) == (SHOWN_AS[one], SHOWN_AS[other])
        why = await chat_and_stay_relayed(ann, bob)
    assert all("symmetric" in words or "no UDP" in words for words in why), why


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [("cone", "symmetric"), ("udpblocked", "udpblocked")],
)
async def test_what_is_said_to_be_in_vain_is_in_vain(lab: Lab, pair: Pair, one: Kind, other: Kind) -> None:
    lab.left.router.become(one)
    lab.right.router.become(other)
    async with met(*pair, lab.relay_url, stubborn=True):
        why = await chat_and_stay_relayed(*pair)
    assert why == ["no pair of addresses lets packets through"] * 2


async def test_what_a_router_does_is_known_before_anyone_dials(lab: Lab, pair: Pair) -> None:
    ann, bob = pair
    for kind in ("none", "fullcone", "symmetric"):
        lab.left.router.become(kind)
        lab.right.router.become("none")
        async with met(ann, bob, lab.relay_url):
            assert await ann.look() == SHOWN_AS[kind]


# ---------------------------------------------------------------- homes of other shapes


@pytest.mark.slow
async def test_two_machines_of_one_home_are_direct_whatever_its_router_does() -> None:
    async with people(Lab(one_lan=True)) as (lab, ann, bob):
        for kind in ("symmetric", "udpblocked"):
            lab.left.router.become(kind)
            await chat_and_become_direct(lab, ann, bob, f"one home behind {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("family", [4, 6])
async def test_two_machines_of_one_network_talk_by_tcp_where_udp_is_stopped(family: Literal[4, 6]) -> None:
    async with people(Lab(one_lan=True, family=family)) as (lab, ann, bob):
        lab.left.machine.nft(
            "table inet firm { chain out { type filter hook output priority 0; meta l4proto udp drop; }; }\n"
        )
        async with met(ann, bob, lab.relay_url, listens=True):
            await ann.say(bob)
            settled = await ann.settle(bob), await bob.settle(ann)
            later = await ann.say(bob)

        assert [each.kind for each in settled] == ["socket", "socket"], settled
        assert (later.there, later.back) == ("direct", "direct")


@pytest.mark.slow
async def test_homes_with_nothing_but_ipv6_become_direct() -> None:
    async with people(Lab(family=6)) as (lab, ann, bob):
        for kind in ("none", "firewall"):
            lab.left.router.become(kind)
            lab.right.router.become(kind)
            await chat_and_become_direct(lab, ann, bob, f"IPv6 {kind}")


@pytest.mark.slow
async def test_homes_that_use_the_same_addresses_become_direct() -> None:
    async with people(Lab(twins=True)) as (lab, ann, bob):
        lab.left.router.become("cone")
        lab.right.router.become("cone")
        await chat_and_become_direct(lab, ann, bob, "twins behind cones")


@pytest.mark.slow
async def test_homes_far_apart_become_direct() -> None:
    async with people(Lab(round_trip_ms=50)) as (lab, ann, bob):
        lab.left.router.become("cone")
        lab.right.router.become("cone")
        await chat_and_become_direct(lab, ann, bob, "cone - cone, 50 ms apart")


# ---------------------------------------------------------------- what is the same for all


async def chat_and_become_direct(lab: Lab, ann: Participant, bob: Participant, who: str) -> None:
    async with met(ann, bob, lab.relay_url):
        first = await ann.say(bob)
        assert (first.there, first.back) == ("relayed", "relayed")
        settled = await ann.settle(bob), await bob.settle(ann)
        assert [each.path for each in settled] == ["direct", "direct"], settled
        later = await ann.say(bob)
        assert (later.there, later.back) == ("direct", "direct")
    print(f"{who}: first word back after {first.ms} ms, direct after {settled[0].ms} ms")


async def chat_and_stay_relayed(ann: Participant, bob: Participant) -> list[str]:
    """Why, as both sides tell it."""
    first = await ann.say(bob)
    settled = await ann.settle(bob), await bob.settle(ann)
    later = await ann.say(bob)
    assert {first.there, first.back, later.there, later.back} == {"relayed"}
    assert {each.path for each in settled} == {"relayed"}
    return [each.why_relayed for each in settled]
