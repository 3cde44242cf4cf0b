"""Many conversations: kept in the browser, found again, named, deleted, saved as files and brought in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from playwright.async_api import Download, Locator, Page, expect

from tests.harness.fake_gateway import FakeGateway, Say, Wait
from tests.page.chatting import ask, hear

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def open_drawer(page: Page) -> Locator:
    await page.get_by_role("button", name="Conversations").click()
    return page.get_by_role("dialog", name="Conversations")


async def two_chats(page: Page, gateway: FakeGateway) -> Locator:
    """Two conversations, one about roses and one about tulips, and the open drawer."""
    await hear(page, gateway, "Tell me about roses", "They have thorns.")
    await page.get_by_role("button", name="New chat").click()
    await hear(page, gateway, "Tell me about tulips", "They have bulbs.")
    drawer = await open_drawer(page)
    await expect(drawer.locator(".open-chat bdi")).to_have_text(
        ["Tell me about tulips", "Tell me about roses"]
    )
    return drawer


async def test_a_reload_brings_the_conversation_back(page: Page, gateway: FakeGateway) -> None:
    await hear(page, gateway, "Tell me about roses", "They have thorns.")

    await page.reload()

    await expect(page.locator("article")).to_have_count(2)
    await expect(page.locator("article.answer .text")).to_have_text("They have thorns.")
    await hear(page, gateway, "And leaves?", "Those too.")
    asked = [message["content"] for message in gateway.asked[-1]["messages"]]
    assert asked == ["Tell me about roses", "They have thorns.", "And leaves?"]


async def test_an_answer_that_a_reload_cut_off_keeps_its_words(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Say("So far"), Wait(asyncio.Event()))
    await expect(await ask(page, "Go on")).to_contain_text("So far")

    await page.reload()

    answer = page.locator("article.answer")
    await expect(answer.locator(".text")).to_have_text("So far")
    await expect(answer).to_contain_text("Stopped")
    await expect(answer.get_by_role("button", name="Try again")).to_be_visible()


async def test_an_old_conversation_goes_on_where_it_was(page: Page, gateway: FakeGateway) -> None:
    drawer = await two_chats(page, gateway)
    await drawer.get_by_role("button", name="Tell me about roses").first.click()
    await expect(page.locator("article.answer .text")).to_have_text("They have thorns.")

    await hear(page, gateway, "Colours?", "Red.")

    await expect(page.locator("article.answer .text")).to_have_text(["They have thorns.", "Red."])
    assert len(gateway.asked[-1]["messages"]) == 3


async def test_conversations_are_searched_by_what_was_said(page: Page, gateway: FakeGateway) -> None:
    drawer = await two_chats(page, gateway)
    search = drawer.get_by_role("searchbox", name="Search what was said")

    await search.fill("THORNS have")
    await expect(drawer.locator(".open-chat bdi")).to_have_text(["Tell me about roses"])
    await search.fill("nettles")
    await expect(drawer).to_contain_text("Nothing here has these words.")


async def test_a_conversation_gets_a_name_and_keeps_it(page: Page, gateway: FakeGateway) -> None:
    drawer = await two_chats(page, gateway)
    await drawer.get_by_role("button", name="Rename Tell me about roses").click()
    await expect(drawer.get_by_label("Name of the conversation")).to_be_focused()
    await page.keyboard.type("Thorny things")
    await page.keyboard.press("Enter")
    titles = drawer.locator(".open-chat bdi")
    await expect(titles).to_have_text(["Tell me about tulips", "Thorny things"])

    await page.reload()

    await open_drawer(page)
    await expect(titles).to_have_text(["Tell me about tulips", "Thorny things"])


async def test_a_deleted_conversation_can_be_taken_back(page: Page, gateway: FakeGateway) -> None:
    drawer = await two_chats(page, gateway)
    await drawer.get_by_role("button", name="Delete Tell me about tulips").click()
    await expect(drawer.locator(".open-chat bdi")).to_have_text(["Tell me about roses"])
    await expect(page.locator("article")).to_have_count(0)

    await drawer.get_by_role("button", name="Undo").click()

    await drawer.get_by_role("button", name="Tell me about tulips").first.click()
    await expect(page.locator("article.answer .text")).to_have_text("They have bulbs.")


async def test_saved_conversations_can_be_brought_in_again(
    page: Page, gateway: FakeGateway, tmp_path: Path
) -> None:
    drawer = await two_chats(page, gateway)
    saved = await save(page, drawer, "Save all as JSON", tmp_path)
    assert saved.suffix == ".json"
    for title in ("roses", "tulips"):
        await drawer.get_by_role("button", name=f"Delete Tell me about {title}").click()
    await expect(drawer.locator(".open-chat")).to_have_count(0)

    await drawer.locator("input[type=file]").set_input_files(saved)

    await expect(drawer).to_contain_text("Brought in 2 conversations.")
    await drawer.get_by_role("button", name="Tell me about roses").first.click()
    await expect(page.locator("article.answer .text")).to_have_text("They have thorns.")


async def test_a_conversation_is_saved_as_markdown(page: Page, gateway: FakeGateway, tmp_path: Path) -> None:
    drawer = await two_chats(page, gateway)
    saved = await save(page, drawer, "Save this one as markdown", tmp_path)
    assert saved.name == "Tell-me-about-tulips.md"
    assert saved.read_text() == (
        "# Tell me about tulips\n\n**You**\n\nTell me about tulips\n\n**Corolla**\n\nThey have bulbs.\n"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ('{"format": "other"}', "holds no conversations"),
        ('{"format": "corolla-conversations", "version": 2, "conversations": []}', "A newer page"),
        (
            json.dumps(
                {
                    "format": "corolla-conversations",
                    "version": 1,
                    "conversations": [
                        {"messages": [{"id": "a", "parent": "b", "role": "user", "content": "x"}]}
                    ],
                }
            ),
            "is damaged",
        ),
    ],
)
async def test_a_strange_file_is_refused_with_the_reason(
    page: Page, tmp_path: Path, content: str, said: str
) -> None:
    strange = tmp_path / "strange.json"
    strange.write_text(content)
    drawer = await open_drawer(page)
    await drawer.locator("input[type=file]").set_input_files(strange)
    await expect(drawer.get_by_role("status")).to_contain_text(said)
    await expect(drawer.locator(".open-chat")).to_have_count(0)


async def test_the_drawer_needs_only_a_keyboard(page: Page, gateway: FakeGateway) -> None:
    await hear(page, gateway, "Tell me about roses", "They have thorns.")
    await page.keyboard.press("Control+k")
    await expect(page.get_by_role("searchbox")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_be_hidden()


async def save(page: Page, drawer: Locator, button: str, folder: Path) -> Path:
    async with page.expect_download() as waiting:
        await drawer.get_by_role("button", name=button).click()
    download: Download = await waiting.value
    path = folder / download.suggested_filename
    await download.save_as(path)
    return path
