"""The swarm page: coverage, peers, what is needed most, and how to lend a machine."""

from __future__ import annotations

import re

import numpy as np
import pytest
import zxingcpp
from playwright.async_api import Page, expect

from tests.harness.fake_gateway import FakeGateway
from tests.page.chatting import hear, sideways

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def open_swarm(page: Page) -> None:
    await page.get_by_role("link", name="Swarm").click()
    await expect(page.get_by_role("region", name="Swarm")).to_be_visible()


async def serve(gateway: FakeGateway, **spans: tuple[int, int]) -> None:
    gateway.forget_models()
    gateway.serve("org/petal", 8, **spans)
    await gateway.tell()


async def test_a_layer_that_one_peer_holds_is_the_weakest_and_needed_most(
    page: Page, gateway: FakeGateway
) -> None:
    await serve(gateway, ann=(0, 8), bob=(0, 2), eve=(5, 8))
    await open_swarm(page)
    await expect(page.locator(".heights b")).to_have_text(["2", "2", "1", "1", "1", "2", "2", "2"])
    await expect(page.locator(".columns figcaption")).to_contain_text("weakest: layers 2–5, 1 peer")
    await expect(page.locator(".need")).to_contain_text("layers 2–5 have only one peer")
    await expect(page.locator(".lending .command code").first).to_have_text(
        "python -m peer --relay ws://127.0.0.1:8787 --model org/petal --layers 2:5"
    )


async def test_missing_layers_are_needed_before_all_else(page: Page, gateway: FakeGateway) -> None:
    await serve(gateway, ann=(0, 3), bob=(0, 3))
    await open_swarm(page)
    await expect(page.locator(".need")).to_contain_text("no one serves layers 3–8")
    await expect(page.locator(".heights .none")).to_have_count(5)


async def test_the_table_tells_of_each_peer(page: Page, gateway: FakeGateway) -> None:
    await open_swarm(page)
    bob = page.locator(".peer-table tr[data-peer=bob]")
    for words in (
        "layers 2–4",
        "cpu",
        "float32",
        "1,200 tokens/s",  # 2400 positions through one layer a second, and it holds two
        "4,096 tokens",
        gateway.path_words["bob"],
        "serving",
    ):
        await expect(bob).to_contain_text(words)
    await expect(page.locator(".peer-table tr[data-peer=eve] .path")).to_have_text("direct")


async def test_the_last_hour_is_drawn_and_said(page: Page, gateway: FakeGateway) -> None:
    artefact = gateway._view["models"][0]["artefact"]
    at = [1000.0 + 15 * number for number in range(41)]
    gateway.history[artefact] = {
        "at": at,
        "peers": [3] * 20 + [2] * 10 + [4] * 11,
        "sessions": [number % 5 for number in range(41)],
        "tokens_per_s": [1200] * 41,
        "kv_tokens_free": [20_000 - 100 * number for number in range(41)],
    }
    await open_swarm(page)
    line = page.get_by_role("img", name="Peers: 4 now; between 2 and 4 in the last 10 minutes")
    await expect(line).to_be_visible()
    path = await line.locator("path").get_attribute("d") or ""
    # A step down and two up: later is further right, more is further up.
    heights = [float(height) for height in re.findall(r"V?(?:M0 )?(\d+\.\d)(?=H|$)", path)]
    assert heights[0] == heights[19] and heights[20] > heights[19] > heights[-1]
    await expect(page.locator(".chart figcaption b")).to_have_text(["4", "0", "1,200", "16k"])
    assert await sideways(page) == []


async def test_before_there_is_an_hour_it_says_so(page: Page) -> None:
    await open_swarm(page)
    await expect(page.locator(".swarm-page")).to_contain_text(
        "The lines begin half a minute after the gateway did."
    )


async def test_what_only_a_relay_reaches_is_told_with_the_reason(page: Page, gateway: FakeGateway) -> None:
    await open_swarm(page)
    reach = page.locator(".reach")
    await expect(reach.locator("summary")).to_have_text(
        "1 of 3 are reached through a relay, which is slower: see why"
    )
    await reach.locator("summary").click()
    await expect(reach.locator("li")).to_have_text([f"bob: {gateway.path_words['bob']}"])


async def test_a_direct_path_that_rests_is_no_reason_to_complain(page: Page, gateway: FakeGateway) -> None:
    gateway.resting = {"bob"}
    await serve(gateway, ann=(0, 3), bob=(3, 8))
    await open_swarm(page)
    await expect(page.locator(".reach")).to_have_text("This gateway reaches each of them directly.")


async def test_each_system_has_its_command(page: Page) -> None:
    await open_swarm(page)
    command = page.locator(".lending .command code").first
    for system, begins in [
        ("Windows", "py -m peer"),
        ("macOS", "python3 -m peer"),
        ("Linux", "python -m peer"),
    ]:
        await page.get_by_label(system).check()
        await expect(command).to_have_text(re.compile(rf"^{begins} --relay ws://127.0.0.1:8787"))


async def test_the_qr_code_leads_to_this_page(page: Page, gateway: FakeGateway) -> None:
    await open_swarm(page)
    code = page.locator("svg.qr")
    drawn = await code.locator("path").get_attribute("d") or ""
    size = int((await code.get_attribute("viewBox") or "").split()[-1])
    image = np.full((size, size), 255, np.uint8)
    for column, row in re.findall(r"M(\d+) (\d+)", drawn):
        image[int(row) + 4, int(column) + 4] = 0
    read = zxingcpp.read_barcode(image.repeat(8, 0).repeat(8, 1))
    assert read is not None
    assert read.text == f"{gateway.url}/#/swarm"


async def test_the_chat_is_there_again_after_a_look_at_the_swarm(page: Page, gateway: FakeGateway) -> None:
    await hear(page, gateway, "Roses?", "Thorns.")
    await open_swarm(page)
    await expect(page.locator("article")).to_have_count(0)
    await page.get_by_role("link", name="Chat").click()
    await expect(page.locator("article.answer .text")).to_have_text("Thorns.")
    await page.go_back()
    await expect(page.get_by_role("region", name="Swarm")).to_be_visible()
    await page.get_by_role("button", name="New chat").click()
    await expect(page.get_by_label("Message to the swarm")).to_be_visible()


async def test_the_swarm_page_fits_a_small_phone(page: Page, gateway: FakeGateway) -> None:
    await page.set_viewport_size({"width": 360, "height": 640})
    await serve(gateway, **{"a-peer-with-a-very-long-name-indeed" * 2: (0, 8)})
    await open_swarm(page)
    assert await sideways(page) == []
