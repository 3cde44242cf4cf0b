"""For everyone: axe, which judges whether people can use a page without seeing it, finds nothing serious."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import pytest
from playwright.async_api import Page, expect

from tests.harness.fake_gateway import FakeGateway
from tests.page.chatting import hear, sideways

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()


async def serious(page: Page) -> list[str]:
    """What axe calls serious or critical, with the elements."""
    await page.evaluate(AXE)
    found: list[str] = await page.evaluate(
        """async () => (await axe.run()).violations
          .filter(({impact}) => impact === "serious" || impact === "critical")
          .map(({id, nodes}) => `${id}: ${nodes.map(({html}) => html).join(" | ")}`)"""
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(
    page: Page, gateway: FakeGateway, scheme: Literal["light", "dark"]
) -> None:
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await expect(page.get_by_role("heading", name="A model in many hands")).to_be_visible()
    assert await serious(page) == []
    await hear(page, gateway, "Roses?", "They have thorns.")
    assert await serious(page) == []
    for name in ("Conversations", "Settings"):
        await page.get_by_role("button", name=name).click()
        await expect(page.get_by_role("dialog", name=name)).to_be_visible()
        assert await serious(page) == []
        await page.keyboard.press("Escape")
    await page.get_by_role("link", name="Swarm").click()
    await expect(page.locator("svg.qr")).to_be_visible()
    assert await serious(page) == []


async def test_every_view_fits_a_small_phone(page: Page, gateway: FakeGateway) -> None:
    await page.set_viewport_size({"width": 360, "height": 640})
    assert await sideways(page) == []
    await hear(page, gateway, "word" * 60, "Yes.")
    assert await sideways(page) == []


async def test_a_lost_network_is_said_and_found_again(page: Page, gateway: FakeGateway) -> None:
    await hear(page, gateway, "Roses?", "Thorns.")
    await gateway.stop()
    banner = page.locator(".notices")
    await expect(banner).to_contain_text("The gateway does not answer")
    await gateway.start()
    await expect(banner).to_be_empty()
    await expect(page.locator("article.answer .text")).to_have_text("Thorns.")
    await hear(page, gateway, "Tulips?", "Bulbs.")
