"""What a data channel's user can rely on, whichever transports carry it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shared.channel.webrtc import best_transports
from shared.framing import HEADER_BYTES
from shared.protocol import MAX_CHUNK_BYTES
from tests.harness.direct_links import linked
from tests.harness.ortc import is_open, ortc_side

FAST = best_transports()
FRAME = bytes(16_400)


async def test_nobody_is_told_of_room_while_he_sends() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        sending = False
        told = []
        ann.link._channel.on("bufferedamountlow", lambda: told.append(sending))
        for _ in range(30):
            while ann.link.ready:
                sending = True
                ann.link.send(FRAME)
                sending = False
            before = len(told)
            while len(told) == before:  # noqa: ASYNC110 - `ann` listens for the same event
                await asyncio.sleep(0)

        assert not any(told)
        assert bob.count > 30


async def test_a_handler_may_send_while_it_is_told_of_room() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        left = list(range(200))

        def more() -> None:
            while left and ann.link.ready:
                ann.link.send(left.pop(0).to_bytes(2, "big") * 5000)

        ann.link._channel.on("bufferedamountlow", more)
        more()
        frames = await bob.got(200)

        assert [int.from_bytes(frame[:2], "big") for frame in frames] == list(range(200))


async def test_a_listener_s_mistake_surfaces_and_the_link_goes_on() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with linked(FAST, FAST) as (ann, bob):
        real, bob.link._on_frame = bob.link._on_frame, lambda link, frame: 1 // 0  # type: ignore[assignment]
        await ann.send(b"first")
        async with asyncio.timeout(10):
            while not complaints:  # noqa: ASYNC110 - the loop's handler has no event
                await asyncio.sleep(0.001)
        bob.link._on_frame = real
        await ann.send(b"second")

        assert await bob.got(1) == [b"second"]
        assert isinstance(complaints[0]["exception"], ZeroDivisionError)


@pytest.mark.parametrize("parameters", [{"ordered": False}, {"maxRetransmits": 0}, {"maxPacketLifeTime": 1}])
async def test_a_channel_that_asks_for_less_is_reliable_all_the_same(parameters: dict[str, int]) -> None:
    async with ortc_side(offers=True) as ann, ortc_side(offers=False) as bob:
        ann_sdp, bob_sdp = await ann.sdp(), await bob.sdp()
        await asyncio.gather(ann.connect(bob_sdp), bob.connect(ann_sdp))
        channel = await is_open(ann.open("hasty", **parameters))
        messages = [number.to_bytes(4, "big") * 3000 for number in range(50)]
        for message in messages:
            channel.send(message)

        assert [await bob.messages.get() for _ in messages] == messages


async def test_a_message_that_the_other_side_does_not_take_is_refused() -> None:
    async with linked(FAST, FAST) as (ann, _):
        most = HEADER_BYTES + MAX_CHUNK_BYTES
        with pytest.raises(ValueError, match=f"{most + 1} bytes, but the other side takes {most}"):
            ann.link.send(bytes(most + 1))
