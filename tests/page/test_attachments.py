"""Text files go with a question: picked, dropped, taken out again, or refused in words."""

from __future__ import annotations

import pytest
from playwright.async_api import FilePayload, Page, expect

from tests.harness.fake_gateway import FakeGateway
from tests.page.chatting import ask, sideways
from tests.page.test_everyone import serious

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def pick(page: Page, **files: bytes) -> None:
    payloads = [FilePayload(name=name, mimeType="text/plain", buffer=held) for name, held in files.items()]
    async with page.expect_file_chooser() as chooser:
        await page.get_by_role("button", name="Attach text files").click()
    await (await chooser.value).set_files(payloads)


async def test_a_picked_file_is_sent_behind_the_question(page: Page, gateway: FakeGateway) -> None:
    await pick(page, **{"roses.md": "# Röses\n```\ncode\n```\n".encode(), "spare.txt": b"no"})
    files = page.get_by_role("list", name="Files that go with it").get_by_role("listitem")
    await expect(files).to_have_count(2)
    assert await serious(page) == []
    await page.get_by_role("button", name="Leave out spare.txt").click()
    await expect(files).to_have_count(1)
    await ask(page, "What is this?")

    await expect(page.locator("article.answer .text")).to_have_text("I have nothing to say.")
    # The fence is longer than the one in the file, or the file would end it.
    expected = "What is this?\n\nroses.md:\n````\n# Röses\n```\ncode\n```\n````"
    assert gateway.asked[0]["messages"] == [{"role": "user", "content": expected}]
    await expect(files).to_have_count(0)


async def test_a_dropped_file_needs_no_words_beside_it(page: Page, gateway: FakeGateway) -> None:
    data = await page.evaluate_handle(
        """() => {
          const data = new DataTransfer();
          data.items.add(new File(["one, two"], "list.csv"));
          return data;
        }"""
    )
    await page.dispatch_event("form.composer textarea", "drop", {"dataTransfer": data})
    await expect(page.get_by_role("list", name="Files that go with it")).to_contain_text("list.csv")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("article.answer .text")).to_have_text("I have nothing to say.")
    assert gateway.asked[0]["messages"][0]["content"] == "list.csv:\n```\none, two\n```"


async def test_what_cannot_go_with_it_is_refused_in_words(page: Page) -> None:
    await pick(
        page, **{"big.txt": b"a" * (64 * 1024 + 1), "picture.png": b"\x89PNG\r\n\x1a\n\0", "good.txt": b"yes"}
    )
    why = (
        "big.txt is too large: a file may have 64 KiB."
        " picture.png is not text; only text files can go with a message."
    )
    await expect(page.locator(".left-out")).to_have_text(why)
    await expect(page.get_by_test_id("announcer")).to_have_text(why)
    await expect(page.get_by_role("list", name="Files that go with it")).to_have_text(["good.txt×"])


async def test_files_fit_a_small_phone(page: Page) -> None:
    await page.set_viewport_size({"width": 360, "height": 640})
    await pick(page, **{"a-very-long-name" * 8 + ".txt": b"yes"})
    await expect(page.get_by_role("list", name="Files that go with it")).to_be_visible()
    assert await sideways(page) == []
