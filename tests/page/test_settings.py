"""Settings, theme, shortcuts, the context meter, and asking again in other words."""

from __future__ import annotations

import pytest
from playwright.async_api import Locator, Page, expect

from tests.harness.fake_gateway import FakeGateway, Say
from tests.page.chatting import hear, sideways

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def open_settings(page: Page) -> Locator:
    await page.get_by_role("button", name="Settings").click()
    return page.get_by_role("dialog", name="Settings")


async def test_settings_go_with_the_question_and_outlive_a_reload(page: Page, gateway: FakeGateway) -> None:
    settings = await open_settings(page)
    await settings.get_by_label("System prompt").fill("Be brief.")
    for name, value in [
        ("Temperature", "0.3"),
        ("Top-p", "0.9"),
        ("Top-k", "40"),
        ("Most tokens", "40"),
        ("Seed", "7"),
    ]:
        await settings.get_by_label(name, exact=True).fill(value)
    await settings.get_by_label("Stop texts").fill("END\n\nEnough")
    await page.reload()
    await hear(page, gateway, "Hi", "Yes.")

    asked = gateway.asked[0]
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    sampling = {name: asked[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "stop")}
    assert sampling == {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 40,
        "seed": 7,
        "stop": ["END", "Enough"],
    }


async def test_a_number_out_of_its_limits_is_marked_and_not_sent(page: Page, gateway: FakeGateway) -> None:
    settings = await open_settings(page)
    field = settings.get_by_label("Temperature", exact=True)
    await field.fill("9")
    assert await field.evaluate("field => field.matches(':invalid')")
    await page.keyboard.press("Escape")
    await hear(page, gateway, "Hi", "Yes.")
    assert "temperature" not in gateway.asked[0]


async def test_the_theme_is_chosen_by_hand_and_kept(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    assert await page.evaluate(paper) == "rgb(250, 246, 241)"
    settings = await open_settings(page)
    await settings.get_by_label("Dark").check()
    assert await page.evaluate(paper) == "rgb(23, 18, 27)"
    await page.reload()
    assert await page.evaluate(paper) == "rgb(23, 18, 27)"
    settings = await open_settings(page)
    await settings.get_by_label("As the system").check()
    await page.emulate_media(color_scheme="light")
    assert await page.evaluate(paper) == "rgb(250, 246, 241)"


async def test_a_question_mark_lists_the_shortcuts_but_not_while_writing(page: Page) -> None:
    dialog = page.get_by_role("dialog", name="Shortcuts")
    await expect(page.get_by_label("Message to the swarm")).to_be_focused()
    await page.keyboard.press("?")
    await expect(page.get_by_label("Message to the swarm")).to_have_value("?")
    await expect(dialog).to_be_hidden()

    await page.get_by_role("region", name="Messages").focus()
    await page.keyboard.press("?")
    await expect(dialog).to_contain_text("New chat")
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()


async def test_the_meter_says_how_much_of_the_context_is_used(page: Page, gateway: FakeGateway) -> None:
    answer = await hear(page, gateway, "Hi", "One two.")
    # The fake gateway's first token stands at position 12, and the answer has two.
    await expect(answer.locator(".context")).to_contain_text("14 of 2,048 tokens")


async def test_a_question_in_other_words_is_a_branch(page: Page, gateway: FakeGateway) -> None:
    await hear(page, gateway, "Roses?", "Thorns.")
    await page.get_by_role("button", name="Edit your message").click()
    field = page.get_by_label("Your message, changed")
    await field.fill("Tulips?")
    gateway.script(Say("Bulbs."))
    await page.keyboard.press("Enter")
    await expect(page.locator("article.answer .text")).to_have_text("Bulbs.")
    await expect(page.locator(".asked .branches")).to_contain_text("2/2")
    assert gateway.asked[1]["messages"] == [{"role": "user", "content": "Tulips?"}]

    await page.get_by_role("button", name="Earlier version").click()
    await expect(page.locator("article.question")).to_have_text("Roses?")
    await expect(page.locator("article.answer .text")).to_have_text("Thorns.")


async def test_another_answer_is_a_branch_too(page: Page, gateway: FakeGateway) -> None:
    answer = await hear(page, gateway, "Roses?", "Thorns.")
    gateway.script(Say("Petals."))
    await answer.get_by_role("button", name="Try again").click()
    await expect(page.locator("article.answer .text")).to_have_text("Petals.")
    await page.get_by_role("button", name="Earlier version").click()
    await expect(page.locator("article.answer .text")).to_have_text("Thorns.")


async def test_the_dialogs_fit_a_small_phone(page: Page) -> None:
    await page.set_viewport_size({"width": 360, "height": 640})
    for name in ("Settings", "Conversations"):
        await page.get_by_role("button", name=name).click()
        await expect(page.get_by_role("dialog", name=name)).to_be_visible()
        assert await sideways(page) == []
        await page.keyboard.press("Escape")
