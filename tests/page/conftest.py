"""One browser for all of these tests, and a gateway with three peers for each."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from playwright.async_api import Browser, Page

from tests.harness.chromium import Visit, open_chromium
from tests.harness.fake_gateway import FakeGateway
from tests.page.chatting import open_page


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with open_chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def gateway() -> AsyncIterator[FakeGateway]:
    """Three peers hold a model of six layers."""
    async with FakeGateway() as gateway:
        gateway.serve("petal", 6, ann=(0, 2), bob=(2, 4), eve=(4, 6))
        yield gateway


@pytest_asyncio.fixture(loop_scope="session")
async def seen(browser: Browser, gateway: FakeGateway) -> AsyncIterator[Visit]:
    async with open_page(browser, gateway) as seen:
        yield seen


@pytest_asyncio.fixture(loop_scope="session")
async def page(seen: Visit) -> Page:
    return seen.page
