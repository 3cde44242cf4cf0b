"""What the tests of the page do again and again: open it, ask, and look whether it fits the screen."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, Locator, Page, expect

from tests.harness.chromium import Visit, visit
from tests.harness.fake_gateway import FakeGateway, Say


@asynccontextmanager
async def open_page(browser: Browser, gateway: FakeGateway, **options: object) -> AsyncGenerator[Visit, None]:
    """A visit in which nothing may go wrong that the test did not ask for."""
    async with visit(browser, gateway.url, **options) as seen:
        yield seen
        assert seen.errors == []
        assert seen.foreign == []
        assert await seen.violations() == []


async def ask(page: Page, question: str) -> Locator:
    """Type a question, send it, and return the answer's place on the page."""
    await page.get_by_label("Message to the swarm").fill(question)
    await page.keyboard.press("Enter")
    return page.locator("article.answer").last


async def hear(page: Page, gateway: FakeGateway, question: str, reply: str) -> Locator:
    """Ask, and wait for the whole of a given answer."""
    gateway.script(Say(reply))
    answer = await ask(page, question)
    await expect(answer.locator(".text")).to_have_text(reply)
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    return answer


async def sideways(page: Page) -> list[str]:
    """What sticks out to the right, or scrolls sideways without being made for it."""
    found: list[str] = await page.evaluate(
        """() => ["html, body, #page, main, .scroll, .column, .route-body, dialog[open]"]
          .flatMap((boxes) => [...document.querySelectorAll(boxes)])
          .filter((box) => box.scrollWidth > box.clientWidth
            || box.getBoundingClientRect().right > innerWidth + 1)
          .map((box) => `${box.tagName} ${box.className} ${box.scrollWidth} > ${box.clientWidth}`)"""
    )
    return found
