"""From any home to any home: at once by the relay, and directly wherever two routers let that happen."""

from __future__ import annotations

from itertools import product

import pytest

from tests.nat.conftest import Pair
from tests.nat.lab import KINDS, Kind, Lab
from tests.nat.participant import met

# The participants' processes are shared, and with them the loop that talks to them.
pytestmark = pytest.mark.asyncio(loop_scope="package")

STRICT = {"firewall", "cone", "symmetric"}


def can_be_direct(one: Kind, other: Kind) -> bool:
    """A port that changes with the destination meets only those who let strangers in."""
    if "udpblocked" in (one, other):
        return False
    return "symmetric" not in (one, other) or not {one, other} <= STRICT


@pytest.mark.parametrize(("one", "other"), [pair for pair in product(KINDS, KINDS) if can_be_direct(*pair)])
async def test_two_homes_chat_at_once_and_become_direct(lab: Lab, pair: Pair, one: Kind, other: Kind) -> None:
    lab.left.router.become(one)
    lab.right.router.become(other)
    ann, bob = pair
    async with met(ann, bob, lab.relay_url):
        first = await ann.say(bob)
        assert (first.there, first.back) == ("relayed", "relayed")
        settled = await ann.settle(bob), await bob.settle(ann)
        print(f"{one} - {other}: first word {first.ms} ms, direct {settled[0].ms} ms")
        assert [each.path for each in settled] == ["direct", "direct"], settled
        later = await ann.say(bob)
        assert (later.there, later.back) == ("direct", "direct")
    assert first.ms < 1000
    assert settled[0].ms < 3000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"), [("cone", "symmetric"), ("symmetric", "symmetric"), ("udpblocked", "cone")]
)
async def test_two_homes_without_a_way_stay_on_the_relay(
    lab: Lab, pair: Pair, one: Kind, other: Kind
) -> None:
    lab.left.router.become(one)
    lab.right.router.become(other)
    ann, bob = pair
    async with met(ann, bob, lab.relay_url):
        assert (await ann.say(bob)).there == "relayed"
        settled = await ann.settle(bob), await bob.settle(ann)
        print(f"{one} - {other}: {settled}")
        assert [each.path for each in settled] == ["relayed", "relayed"]
        later = await ann.say(bob)
        assert (later.there, later.back) == ("relayed", "relayed")
