"""The route of any token of an answer: by pointing at it, or by stepping through them."""

from __future__ import annotations

import asyncio
import re

import pytest
from playwright.async_api import Page, expect

from tests.harness.fake_gateway import FakeGateway, Reroute, Say, Wait
from tests.page.chatting import ask

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

SENTENCE = "route-sentence"
MARKED = "[...(CSS.highlights.get('looked-token') ?? [])].map(String).join('')"


async def rerouted_answer(page: Page, gateway: FakeGateway) -> None:
    """The first word came through bob, the second through zoe, who took over."""
    gateway.script(
        Say("**early** ", characters=10), Reroute(lost="bob", heir="zoe"), Say("later", characters=5)
    )
    answer = await ask(page, "Hi")
    await expect(answer.locator(".text")).to_have_text("early later")
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await expect(page.get_by_test_id(SENTENCE)).to_contain_text("zoe")


async def test_pointing_at_a_word_shows_the_route_that_made_it(page: Page, gateway: FakeGateway) -> None:
    await rerouted_answer(page, gateway)
    await page.locator("article.answer strong").hover()
    await expect(page.get_by_test_id(SENTENCE)).to_contain_text("bob")
    await expect(page.locator(".lane.lit[data-peer=bob]")).to_be_visible()
    assert (await page.evaluate(MARKED)).strip() == "early"

    await page.mouse.move(5, 5)
    await expect(page.get_by_test_id(SENTENCE)).to_contain_text("zoe")
    assert await page.evaluate(MARKED) == ""


async def test_arrow_keys_step_through_the_tokens(page: Page, gateway: FakeGateway) -> None:
    await rerouted_answer(page, gateway)
    stepper = page.get_by_role("slider", name="Route of each token")
    await stepper.focus()
    await page.keyboard.press("ArrowLeft")
    await expect(page.get_by_test_id(SENTENCE)).to_contain_text("bob")
    await expect(stepper).to_have_attribute("aria-valuetext", re.compile(r"^token 1 of 2 “\*\*early\*\*”"))
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_test_id(SENTENCE)).to_contain_text("zoe")


async def test_the_hop_that_takes_most_of_the_time_is_the_warmest(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Say("one two three four "), Wait(asyncio.Event()))
    await ask(page, "Hi")
    warmth = {}
    for name in ("ann", "bob", "eve"):
        lane = page.locator(f".lane.lit[data-peer={name}]")
        await expect(lane.locator(".share")).to_contain_text("%")
        warmth[name] = float(await lane.evaluate("lane => lane.style.getPropertyValue('--heat')"))
    # Each holds two layers, and the link to bob leads through a relay.
    assert max(warmth, key=lambda name: warmth[name]) == "bob"
    assert sum(warmth.values()) == pytest.approx(1)
