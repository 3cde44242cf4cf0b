"""How long packets become, and that they become short again when the path changes."""

from __future__ import annotations

import asyncio
import subprocess

import pytest

from shared.channel.fast.path_mtu import (
    LONGEST_PACKET_BYTES,
    PROBED_PACKET_BYTES,
    PROBES,
    SAFE_PACKET_BYTES,
    PathMtu,
)
from shared.channel.webrtc import PLAIN, best_transports
from tests.harness.commands import ROOT, python
from tests.harness.direct_links import Side, frames_in, linked, random_frames
from tests.harness.lossy_path import LossyPath, at_random
from tests.harness.namespaces import namespaces, why_unavailable

FAST = best_transports()
LEAST_LONG_BYTES = PROBED_PACKET_BYTES[-1]


def packet_bytes(side: Side) -> int:
    """How long packets of this side are now."""
    found: int = side.link._sctp._path.packet_bytes  # type: ignore[attr-defined]
    return found


async def lengthened(side: Side) -> int:
    async with asyncio.timeout(20):
        while packet_bytes(side) == SAFE_PACKET_BYTES:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
    return packet_bytes(side)


def test_each_length_is_asked_for_a_few_times_from_the_longest_down() -> None:
    path = PathMtu(LONGEST_PACKET_BYTES)
    asked = [path.next_probe() for _ in range(PROBES * len(PROBED_PACKET_BYTES) + 1)]

    assert asked == [size for size in PROBED_PACKET_BYTES for _ in range(PROBES)] + [None]
    assert path.packet_bytes == SAFE_PACKET_BYTES


def test_an_answer_ends_the_search() -> None:
    path = PathMtu(LONGEST_PACKET_BYTES)
    path.next_probe()
    path.refused()

    # Late, or never asked for.
    assert not path.answered(LONGEST_PACKET_BYTES)
    assert not path.answered(4000)
    assert path.answered(PROBED_PACKET_BYTES[1])
    assert path.packet_bytes == PROBED_PACKET_BYTES[1]
    assert path.next_probe() is None


@pytest.mark.parametrize("longest", [0, SAFE_PACKET_BYTES, LEAST_LONG_BYTES - 1])
def test_who_reads_only_short_packets_is_asked_nothing(longest: int) -> None:
    assert PathMtu(longest).next_probe() is None


async def test_on_one_machine_packets_are_as_long_as_records_may_be() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        assert await lengthened(ann) == await lengthened(bob) == LONGEST_PACKET_BYTES


async def test_stock_aiortc_gets_the_packets_it_reads() -> None:
    async with linked(FAST, PLAIN) as (ann, bob):
        sent = await ann.send_all(random_frames(200_000, seed=1))
        await bob.got(frames_in(200_000, seed=1))

        assert bob.digest == sent
        assert packet_bytes(ann) == SAFE_PACKET_BYTES


async def test_over_ethernet_packets_grow_as_far_as_it_takes_them() -> None:
    async with LossyPath() as path, linked(FAST, FAST, path=path) as (ann, bob):
        assert await lengthened(ann) == await lengthened(bob) == 1404


async def test_long_packets_that_are_lost_come_again() -> None:
    path = LossyPath(at_random(0.04, seed=1), at_random(0.04, seed=2), longest_bytes=65_535)
    async with path, linked(FAST, FAST, path=path) as (ann, bob):
        assert await lengthened(ann) == LONGEST_PACKET_BYTES
        sent = await ann.send_all(random_frames(8 << 20, seed=1))
        await bob.got(frames_in(8 << 20, seed=1))

        assert bob.digest == sent
        assert path.harmed > 0


@pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
def test_a_path_that_becomes_narrow_in_the_midst_loses_nothing() -> None:
    with namespaces("narrow") as (machine,):
        machine.ip(
            "link add home type veth peer name street", "addr add 192.0.2.1/24 dev home", "link set home up"
        )
        done = subprocess.run(
            machine.command(*python("tests.shared.channel.fast.narrowed")),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    assert done.stdout.split() == ["16320", "1188", "equal"], done.stderr
