"""A real Chromium for tests of the page, which can reach this machine only and notes what a page tries."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",  # tests may run as root, where Chromium has no sandbox
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]

_NOTE_VIOLATIONS = """
window.violations = [];
window.executed = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@asynccontextmanager
async def open_chromium(*flags: str) -> AsyncGenerator[Browser, None]:
    """The browser of this machine. Fails the test when there is none: skipping would hide a broken page."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.fail("Chromium is missing, and the page cannot be tested without it: `make test` installs it")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found, args=[*FLAGS, *flags])
        yield browser
        await browser.close()


class Visit:
    """One visit to the page, with everything it asked for and everything that went wrong in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.foreign: list[str] = []
        """Addresses that are not the gateway's."""
        self.errors: list[str] = []
        page.on("request", self._note_request)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append(f"a dialog opened: {dialog.message}"))
        page.on("popup", lambda popup: self.errors.append(f"a window opened: {popup.url}"))

    def _note_request(self, request: Any) -> None:  # noqa: ANN401 - playwright's own type
        if not request.url.startswith(self.url + "/"):
            self.foreign.append(request.url)

    async def violations(self) -> list[str]:
        """What the page's policy had to stop."""
        return list(await self.page.evaluate("window.violations"))

    async def executed(self) -> list[str]:
        """What foreign scripts left behind."""
        return list(await self.page.evaluate("window.executed"))


@asynccontextmanager
async def visit(browser: Browser, url: str, **options: Any) -> AsyncGenerator[Visit, None]:  # noqa: ANN401
    """A tab that opens the page; `options` are those of playwright's `new_context`.

    Visits without options share a profile, which is faster. Each test has a gateway of its own, and with it
    an origin of its own, so nothing is left for the next one.
    """
    plain = [context for context in browser.contexts if not options]
    context = plain[0] if plain else await _new_context(browser, options)
    page = await context.new_page()
    seen = Visit(page, url)
    try:
        await page.goto(url)
        yield seen
    finally:
        await (context.close() if options else page.close())


async def _new_context(browser: Browser, options: dict[str, Any]) -> BrowserContext:
    context = await browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(10_000)
    await context.add_init_script(_NOTE_VIOLATIONS)
    return context
