"""The main job in one piece: a person asks in a browser, three peers answer, one of them dies on the way."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Locator, Page, Route, expect
from transformers import AutoTokenizer

from peer.settings import DEMO_MODEL
from tests.harness.chromium import Visit, open_chromium, visit
from tests.harness.swarm import Swarm, reference
from web.app import Gateway, GatewaySettings

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

MODEL = Path(DEMO_MODEL)
QUESTION = "Tell me a story"
LOADING_MS = 30_000
"""The gateway's first answer loads its tokenizer library."""


@pytest.fixture(scope="module")
def story() -> str:
    """The unsplit model's answer to the question, by transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    asked = [{"role": "user", "content": QUESTION}]
    prompt = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"])
    made = reference(MODEL, prompt, 400)
    return str(tokenizer.decode(made[: made.index(tokenizer.eos_token_id)]))


@pytest_asyncio.fixture(loop_scope="module")
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm(MODEL) as swarm:
        await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
        yield swarm


@pytest_asyncio.fixture(loop_scope="module")
async def seen(swarm: Swarm, tmp_path: Path) -> AsyncIterator[Visit]:
    """The page of a true gateway, on which nothing may go wrong."""
    async with (
        open_chromium() as browser,
        Gateway(GatewaySettings(data_dir=tmp_path), swarm.client) as gateway,
        visit(browser, gateway.url.rstrip("/")) as seen,
    ):
        await seen.page.route("**/v1/chat/completions", _greedily)
        yield seen
        assert (seen.errors, seen.foreign, await seen.violations()) == ([], [], [])


async def _greedily(route: Route) -> None:
    """The page leaves the temperature to the API; only a greedy answer has one right text."""
    body = route.request.post_data_json
    assert isinstance(body, dict)
    await route.continue_(post_data={**body, "temperature": 0})


async def ask(page: Page) -> Locator:
    await page.get_by_label("Message to the swarm").fill(QUESTION)
    await page.keyboard.press("Enter")
    return page.locator("article.answer").last


async def words_of(answer: Locator) -> list[str]:
    return (await answer.locator(".text").inner_text()).split()


async def test_three_peers_answer_and_the_route_of_the_answer_is_shown(seen: Visit, story: str) -> None:
    page = seen.page
    answer = await ask(page)

    await expect(answer).to_contain_text("first after", timeout=LOADING_MS)

    assert await words_of(answer) == story.split()
    await expect(page.locator(".lane.lit")).to_have_count(3)
    sentence = page.get_by_test_id("route-sentence")
    for hop in ("ann (layers 0–2", "bob (layers 2–4", "eve (layers 4–6"):
        await expect(sentence).to_contain_text(hop)


async def test_a_peer_that_dies_in_mid_answer_is_replaced_before_everyones_eyes(
    seen: Visit, swarm: Swarm, story: str
) -> None:
    page = seen.page
    await swarm.start(ben=(2, 4))
    answer = await ask(page)
    await expect(page.locator(".lane.lit")).to_have_count(3, timeout=LOADING_MS)
    lit = await page.locator(".lane.lit").all_inner_texts()
    victim, heir = ("bob", "ben") if any("bob" in lane for lane in lit) else ("ben", "bob")

    await swarm.stop(victim)

    # Whether the heir was its standby already depends on how soon it died.
    said = re.compile(rf"{victim} \(layers 2–4\) went away; {heir} .*took over")
    await expect(page.get_by_role("list", name="Changes of the route")).to_contain_text(said)
    await expect(answer).to_contain_text("first after", timeout=LOADING_MS)
    assert await words_of(answer) == story.split()


async def test_a_stopped_answer_keeps_its_words_and_frees_every_peer(
    seen: Visit, swarm: Swarm, story: str
) -> None:
    page = seen.page
    answer = await ask(page)
    await expect(page.locator(".lane.lit")).to_have_count(3, timeout=LOADING_MS)

    await page.get_by_role("button", name="Stop").click()

    await expect(answer).to_contain_text("Stopped")
    words = await words_of(answer)
    assert 0 < len(words) < len(story.split())
    async with asyncio.timeout(5):
        for peer in swarm.peers.values():
            assert peer.service is not None
            await peer.service.drained()
    assert set(swarm.reserved_bytes().values()) == {0}
