"""Our data channel speaks with those of others, stock aiortc and Chromium, whoever offers or opens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiortc import RTCDataChannel, RTCPeerConnection, RTCSessionDescription
from playwright.async_api import Page

from shared.channel.webrtc import PLAIN
from tests.harness.chromium import open_chromium
from tests.harness.ortc import OrtcSide, is_open, ortc_side

SIZES = (1, 1159, 1160, 1161, 4000, 16_400, 65_536, 262_144)
MESSAGES: list[bytes | str] = [
    *(bytes((size + place) % 251 for place in range(size)) for size in SIZES),
    b"",
    "",
    "grüße",
]


async def echoed(side: OrtcSide, channel: RTCDataChannel) -> list[bytes | str]:
    """Send all messages, and what came back."""
    for message in MESSAGES:
        channel.send(message)
    return [await side.messages.get() for _ in MESSAGES]


class StockPeer:
    """A stock `RTCPeerConnection` that sends back whatever it hears."""

    def __init__(self) -> None:
        self.connection = RTCPeerConnection()
        self.connection.on("datachannel", self._echo)

    def open(self) -> None:
        self._echo(self.connection.createDataChannel("theirs"))

    def _echo(self, channel: RTCDataChannel) -> None:
        channel.on("message", channel.send)

    async def offer(self) -> str:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return self.connection.localDescription.sdp

    async def answer(self, offer: str) -> str:
        await self.connection.setRemoteDescription(RTCSessionDescription(offer, "offer"))
        await self.connection.setLocalDescription(await self.connection.createAnswer())
        return self.connection.localDescription.sdp

    async def accept(self, answer: str) -> None:
        await self.connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))


@pytest.mark.parametrize("transports", [None, PLAIN], ids=["fast", "plain"])
async def test_stock_aiortc_hears_and_answers_our_offer(transports: Any) -> None:  # noqa: ANN401
    stock = StockPeer()
    async with ortc_side(offers=True, transports=transports) as ours:
        await ours.connect(await stock.answer(await ours.sdp()))
        channel = await is_open(ours.open("ours"))

        assert await echoed(ours, channel) == MESSAGES
        await stock.connection.close()


async def test_we_answer_an_offer_of_stock_aiortc_and_a_channel_that_it_opens() -> None:
    stock = StockPeer()
    stock.open()
    async with ortc_side(offers=False) as ours:
        offer = await stock.offer()
        await asyncio.gather(stock.accept(await ours.sdp()), ours.connect(offer))
        channel = await ours.announced.get()

        assert channel.label == "theirs"
        assert await echoed(ours, channel) == MESSAGES
        await stock.connection.close()


async def test_a_channel_that_one_side_closes_closes_at_the_other() -> None:
    stock = StockPeer()
    async with ortc_side(offers=True) as ours:
        await ours.connect(await stock.answer(await ours.sdp()))
        channel, again = await is_open(ours.open("ours")), await is_open(ours.open("again"))
        closed = asyncio.Event()
        channel.on("close", closed.set)
        channel.send(b"last")
        channel.close()
        await closed.wait()

        assert await ours.messages.get() == b"last"
        again.send(b"still here")
        assert await ours.messages.get() == b"still here"
        await stock.connection.close()


_CHROMIUM = """
window.pc = new RTCPeerConnection();
window.echo = (channel) => {
  channel.binaryType = "arraybuffer";
  channel.onmessage = (event) => channel.send(event.data);
};
pc.ondatachannel = (event) => echo(event.channel);
window.gathered = () => new Promise((resolve) => {
  const look = () => pc.iceGatheringState === "complete" && resolve(pc.localDescription.sdp);
  pc.onicegatheringstatechange = look;
  look();
});
null;  // playwright calls what a script ends with, if it can
"""


class ChromiumPeer:
    """Chromium's `RTCPeerConnection`, which sends back whatever it hears."""

    def __init__(self, page: Page) -> None:
        self._page = page

    async def run(self, script: str) -> Any:  # noqa: ANN401 - whatever the script returns
        return await self._page.evaluate(f"(async () => {{ {script} }})()")

    async def begin(self) -> None:
        await self._page.evaluate(_CHROMIUM)

    async def offer(self) -> str:
        return str(
            await self.run(
                "echo(pc.createDataChannel('theirs'));"
                "await pc.setLocalDescription(await pc.createOffer()); return await gathered();"
            )
        )

    async def answer(self, offer: str) -> str:
        described = json.dumps({"type": "offer", "sdp": offer})
        return str(
            await self.run(
                f"await pc.setRemoteDescription({described});"
                "await pc.setLocalDescription(await pc.createAnswer()); return await gathered();"
            )
        )

    async def accept(self, answer: str) -> None:
        await self.run(f"await pc.setRemoteDescription({json.dumps({'type': 'answer', 'sdp': answer})});")


@pytest.mark.browser
@pytest.mark.parametrize("we_offer", [True, False], ids=["we offer", "Chromium offers"])
async def test_chromium_sends_back_what_we_say(we_offer: bool) -> None:
    # Without this, host candidates are names that only multicast DNS resolves.
    async with open_chromium("--disable-features=WebRtcHideLocalIpsWithMdns") as browser:
        chromium = ChromiumPeer(await browser.new_page())
        await chromium.begin()
        async with ortc_side(offers=we_offer) as ours:
            if we_offer:
                await ours.connect(await chromium.answer(await ours.sdp()))
                channel = await is_open(ours.open("ours"))
            else:
                offer = await chromium.offer()
                await asyncio.gather(chromium.accept(await ours.sdp()), ours.connect(offer))
                channel = await ours.announced.get()

            assert await echoed(ours, channel) == MESSAGES
            assert [await echoed(ours, channel) for _ in range(20)] == [MESSAGES] * 20
            await chromium.run("pc.close()")
