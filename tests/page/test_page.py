"""The page in a real browser: chatting, the route, and what must hold when things go wrong or get hostile."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect

from tests.harness.chromium import visit
from tests.harness.fake_gateway import Cut, Drop, Fail, FakeGateway, Queue, Refuse, Reroute, Say, Wait
from tests.harness.fake_swarm import FakeSwarm
from tests.harness.hostile_answers import HOSTILE
from tests.page.chatting import ask, open_page, sideways
from web.app import Gateway, GatewaySettings

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

MARKDOWN = """Petals are **layers**:

1. one
2. two

| peer | span |
|------|------|
| ann  | 0–2  |

```python
def petal() -> int:
    return 6
```

[More](https://example.org/more) about it."""


async def send_button_is_back(page: Page) -> None:
    await expect(page.get_by_role("button", name="Send")).to_be_visible()


# ---------------------------------------------------------------- chatting


async def test_an_answer_streams_as_formatted_text(page: Page, gateway: FakeGateway) -> None:
    gate = asyncio.Event()
    gateway.script(Say(MARKDOWN), Wait(gate), Say("\n\nThe end."))

    answer = await ask(page, "What are petals?")
    await expect(answer.locator("ol > li")).to_have_count(2)
    await expect(answer).not_to_contain_text("The end.")
    gate.set()

    await expect(answer).to_contain_text("The end.")
    await expect(answer.locator("strong")).to_have_text("layers")
    await expect(answer.locator("td").first).to_have_text("ann")
    await expect(answer.locator(".code .hljs-keyword").first).to_have_text("def")
    link = answer.get_by_role("link", name="More")
    assert await link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert await link.get_attribute("target") == "_blank"
    await expect(answer).to_contain_text("first after")
    assert gateway.asked[0]["messages"] == [{"role": "user", "content": "What are petals?"}]
    assert gateway.asked[0]["swarm"] == {"route": True}


async def test_the_next_question_carries_the_conversation(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Say("Six."))
    await expect(await ask(page, "How many layers?")).to_contain_text("Six.")
    await send_button_is_back(page)

    await expect(await ask(page, "Sure?")).to_contain_text("nothing to say")
    assert [message["content"] for message in gateway.asked[1]["messages"]] == [
        "How many layers?",
        "Six.",
        "Sure?",
    ]


async def test_the_true_gateway_serves_this_page(browser: Browser, tmp_path: Path) -> None:
    swarm = FakeSwarm()
    swarm.serve("petal", ann=(0, 2), bob=(2, 4))
    swarm.say("Hello **there**.")
    async with (
        Gateway(GatewaySettings(data_dir=tmp_path), swarm) as gateway,
        visit(browser, gateway.url.rstrip("/")) as seen,
    ):
        answer = await ask(seen.page, "Hi")
        # The gateway's first answer loads its tokenizer library, which takes some seconds.
        await expect(answer.locator("strong")).to_have_text("there", timeout=20_000)
        await expect(seen.page.locator(".lane.lit")).to_have_count(2)
        await expect(seen.page.get_by_test_id("route-sentence")).to_contain_text("you → ann (layers 0–2")
        assert (seen.errors, seen.foreign, await seen.violations()) == ([], [], [])


async def test_a_gateway_with_keys_asks_for_one_until_it_is_right(browser: Browser, tmp_path: Path) -> None:
    swarm = FakeSwarm()
    swarm.serve("petal", ann=(0, 4))
    settings = GatewaySettings(data_dir=tmp_path, api_keys=("sk-right",))
    async with Gateway(settings, swarm) as gateway, visit(browser, gateway.url.rstrip("/")) as seen:
        page = seen.page
        answer = await ask(page, "Hi")
        dialog = page.get_by_role("dialog", name="This gateway asks for a key")
        await expect(dialog).to_be_visible()
        await page.get_by_label("Key of this gateway").fill("sk-wrong")
        await page.keyboard.press("Enter")
        await expect(dialog).to_contain_text("The gateway does not know that key.")
        await page.keyboard.press("Escape")
        await expect(answer).to_contain_text("this gateway asks for a key")

        swarm.say("Welcome.")
        await answer.get_by_role("button", name="Try again").click()
        await page.get_by_label("Key of this gateway").fill("sk-right")
        await page.get_by_role("button", name="Use this key").click()
        await expect(page.locator("article.answer .text").last).to_have_text("Welcome.", timeout=20_000)

        # It is kept, until the reader has it forgotten.
        await page.reload()
        swarm.say("Again.")
        await expect(page.locator("article.answer .text").last).to_have_text("Welcome.")
        await expect((await ask(page, "Hi")).locator(".text")).to_have_text("Again.")
        await page.get_by_role("button", name="Settings").click()
        await page.get_by_role("button", name="Forget the key").click()
        assert await page.evaluate("localStorage.getItem('corolla-key')") is None
        assert await seen.violations() == []


async def test_code_can_be_copied(browser: Browser, gateway: FakeGateway) -> None:
    gateway.script(Say(MARKDOWN))
    async with open_page(browser, gateway, permissions=["clipboard-read", "clipboard-write"]) as seen:
        answer = await ask(seen.page, "Code?")
        await answer.get_by_role("button", name="Copy the code").click()
        await expect(answer.locator(".code-bar button")).to_have_text("Copied")
        copied = await seen.page.evaluate("navigator.clipboard.readText()")
        assert copied == "def petal() -> int:\n    return 6"


@pytest.mark.parametrize("way", ["button", "Escape"])
async def test_stopping_keeps_the_words_and_frees_the_swarm(
    page: Page, gateway: FakeGateway, way: str
) -> None:
    gateway.script(Say("So far"), Wait(asyncio.Event()))
    answer = await ask(page, "Tell me everything")
    await expect(answer).to_contain_text("So far")

    if way == "button":
        await page.get_by_role("button", name="Stop").click()
    else:
        await page.keyboard.press("Escape")

    async with asyncio.timeout(5):
        await gateway.left.wait()
    await expect(answer).to_contain_text("Stopped")
    await expect(answer).to_contain_text("So far")
    await expect(page.get_by_label("Message to the swarm")).to_be_focused()


async def test_an_answer_that_was_cut_short_goes_on_in_its_place(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Say("Petals are **lay"), Cut())
    answer = await ask(page, "What are petals?")
    await expect(answer).to_contain_text("Reached its longest")
    gateway.script(Say("ers** of a "), Fail("eve left and nobody took over"))
    await answer.get_by_role("button", name="Continue").click()
    await expect(answer).to_contain_text("eve left and nobody took over")
    await expect(answer.locator(".text strong")).to_have_text("layers")
    gateway.script(Say(" flower."))
    await answer.get_by_role("button", name="Continue").click()

    await expect(answer.locator(".text")).to_have_text("Petals are layers of a flower.")
    await expect(answer).not_to_contain_text("eve left")
    await expect(answer.get_by_role("button", name="Continue")).to_have_count(0)
    await expect(page.locator("article.answer")).to_have_count(1)
    assert "continue_final_message" not in gateway.asked[0]
    assert [asked.get("continue_final_message") for asked in gateway.asked[1:]] == [True, True]
    assert [asked["messages"][-1] for asked in gateway.asked[1:]] == [
        {"role": "assistant", "content": "Petals are **lay"},
        {"role": "assistant", "content": "Petals are **layers** of a"},
    ]


async def test_ones_place_in_line_is_said_until_ones_turn_comes(page: Page, gateway: FakeGateway) -> None:
    turn, spoken = asyncio.Event(), asyncio.Event()
    gateway.script(Queue(2), Wait(turn), Queue(0), Wait(spoken), Say("Thorns."))
    answer = await ask(page, "Roses?")
    await expect(answer.locator(".reading")).to_have_text("The swarm is full; 1 more before you")
    turn.set()
    await expect(answer.locator(".reading")).to_have_text("The peers are reading your message")
    spoken.set()
    await expect(answer.locator(".text")).to_have_text("Thorns.")


async def test_a_stopped_answer_goes_on_and_is_read_out_once(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Say("One two."), Wait(asyncio.Event()))
    answer = await ask(page, "Count")
    await expect(answer).to_contain_text("One two.")
    await page.keyboard.press("Escape")
    gateway.script(Say(" Three four."))
    await answer.get_by_role("button", name="Continue").click()
    await expect(answer.locator(".text")).to_have_text("One two. Three four.")
    # Later questions see one answer, and an answer that nothing was said of is not sent at all.
    gateway.script(Say("Five."))
    await ask(page, "And then?")
    await send_button_is_back(page)
    assert [message["content"] for message in gateway.asked[-1]["messages"]] == [
        "Count",
        "One two. Three four.",
        "And then?",
    ]


async def test_enter_sends_but_not_with_shift_nor_while_composing(page: Page, gateway: FakeGateway) -> None:
    field = page.get_by_label("Message to the swarm")
    await field.type("one")
    await page.keyboard.press("Shift+Enter")
    await field.type("two")
    await field.evaluate(
        "field => field.dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    await expect(field).to_have_value("one\ntwo")

    await page.keyboard.press("Enter")
    await expect(page.locator("article.question")).to_have_text("one\ntwo")
    await expect(field).to_have_value("")


async def test_a_new_chat_stops_the_answer_and_starts_empty(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Say("Going on"), Wait(asyncio.Event()))
    await expect(await ask(page, "Go")).to_contain_text("Going on")

    await page.get_by_role("button", name="New chat").click()

    async with asyncio.timeout(5):
        await gateway.left.wait()
    await expect(page.locator("article")).to_have_count(0)
    await expect(page.get_by_role("heading", name="A model in many hands")).to_be_visible()
    await expect(await ask(page, "Hi")).to_contain_text("nothing to say")
    assert len(gateway.asked[1]["messages"]) == 1


async def test_a_second_model_can_be_chosen(page: Page, gateway: FakeGateway) -> None:
    await expect(page.get_by_label("Model")).to_have_count(0)
    gateway.serve("sepal", 4, max=(0, 4))
    await gateway.tell()

    await expect(page.get_by_label("Model").get_by_role("option")).to_have_text(
        [re.compile("petal – every layer served"), re.compile("sepal – every layer served")]
    )
    await page.get_by_label("Model").select_option("sepal")

    await expect(page.locator(".lane")).to_have_count(1)
    await expect(await ask(page, "Hi")).to_contain_text("nothing to say")
    assert gateway.asked[0]["model"] == "sepal"


async def test_the_page_says_who_can_read_before_the_first_message(page: Page) -> None:
    note = page.get_by_role("complementary", name="Who can read this")
    await expect(note).to_contain_text("Whoever holds the first layers can read them")


# ---------------------------------------------------------------- the route


async def test_the_route_of_the_newest_token_is_lit(page: Page, gateway: FakeGateway) -> None:
    await expect(page.locator(".lane")).to_have_count(3)
    await expect(page.locator(".lane.lit")).to_have_count(0)
    await expect(page.locator(".vine")).to_have_count(0)
    gateway.script(Say("Hello from the swarm"))
    await ask(page, "Hi")

    await expect(page.locator(".lane.lit")).to_have_count(3)
    bob = page.locator(".lane[data-peer=bob]")
    await expect(bob).to_contain_text("relayed, 3.5 ms")
    await expect(bob).to_contain_text("waited 0.")
    await expect(bob.locator(".time")).to_contain_text(" ms")
    # By shape too: dashed with a diamond through the relay, a solid line where it is direct.
    await expect(page.locator(".vine .stem.relayed")).to_have_count(1)
    await expect(page.locator(".vine .relay")).to_have_count(1)
    await expect(page.locator(".vine .stem.direct")).to_have_count(1)
    sentence = page.get_by_test_id("route-sentence")
    await expect(sentence).to_have_text(
        "you → ann (layers 0–2, 1.2 ms, local) → bob (layers 2–4, 1.3 ms, relayed)"
        " → eve (layers 4–6, 1.3 ms, direct) → you"
    )
    await expect(page.locator(".numbers")).to_contain_text("tokens/s")


async def test_a_peer_tells_how_it_is_reached_and_why_not_better(page: Page, gateway: FakeGateway) -> None:
    bob, eve = (page.locator(f".lane[data-peer={name}] .who") for name in ("bob", "eve"))
    await expect(bob).to_have_attribute("title", gateway.path_words["bob"])
    await expect(eve).not_to_have_attribute("title", re.compile(".*"))
    await expect(await ask(page, "Hi")).to_contain_text("nothing to say")
    reached = page.get_by_role("list", name="How the peers of this route are reached")
    await expect(reached.get_by_role("listitem")).to_have_text(f"bob: {gateway.path_words['bob']}")


async def test_a_reroute_is_said_and_seen(page: Page, gateway: FakeGateway) -> None:
    gate = asyncio.Event()
    gateway.script(Say("one "), Wait(gate), Reroute(lost="bob", heir="zoe"), Say("two"))
    answer = await ask(page, "Count")
    await expect(page.locator(".lane.lit[data-peer=bob]")).to_be_visible()

    gate.set()

    await expect(answer).to_contain_text("one two")
    said = "bob (layers 2–4) went away; zoe took over"
    await expect(page.get_by_role("list", name="Changes of the route")).to_have_text(said)
    await expect(page.get_by_test_id("announcer")).to_contain_text(said)
    await expect(page.locator(".lane.lost[data-peer=bob]")).to_contain_text("gone")
    await expect(page.locator(".lane.lit[data-peer=zoe]")).to_be_visible()


async def test_many_tokens_cost_at_most_ten_drawings_a_second(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Say("word " * 200, characters=5, every_s=0.003))
    await page.evaluate(
        """() => {
          window.drawings = 0;
          new MutationObserver(() => window.drawings++)
            .observe(document.querySelector(".numbers"), {subtree: true, characterData: true});
        }"""
    )
    began = time.monotonic()
    answer = await ask(page, "Fast")
    await send_button_is_back(page)
    await expect(answer).to_contain_text("200 tokens")
    await expect(answer).to_contain_text("tokens/s")
    assert await page.evaluate("window.drawings") <= 10 * (time.monotonic() - began) + 2


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
async def test_nothing_moves_for_those_who_asked_for_that(
    browser: Browser, gateway: FakeGateway, motion: str
) -> None:
    async with open_page(browser, gateway, reduced_motion=motion) as seen:
        await seen.page.evaluate(
            """() => {
              window.pulses = 0;
              const animate = Element.prototype.animate;
              Element.prototype.animate = function (...a) { window.pulses++; return animate.apply(this, a); };
            }"""
        )
        gateway.script(Say("word " * 20, every_s=0.01), Wait(asyncio.Event()))
        await expect(await ask(seen.page, "Hi")).to_contain_text("word")
        await expect(seen.page.locator(".lane.lit")).to_have_count(3)
        moved = await seen.page.evaluate("window.pulses + document.getAnimations().length")
        assert (moved == 0) == (motion == "reduce")


# ---------------------------------------------------------------- when things go wrong


async def test_an_error_keeps_the_words_and_offers_another_try(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Say("So far so good"), Fail("no live peer serves layer 4 of 6"))
    gateway.script(Say("Better now"))
    answer = await ask(page, "Hi")
    await expect(answer).to_contain_text("The answer broke off: no live peer serves layer 4 of 6.")
    await expect(answer).to_contain_text("So far so good")

    await page.get_by_role("button", name="Try again").click()

    await expect(page.locator("article.answer")).to_contain_text("Better now")
    assert gateway.asked[1]["messages"] == gateway.asked[0]["messages"]


async def test_a_refusal_says_why(page: Page, gateway: FakeGateway) -> None:
    gateway.script(Refuse(429, "every peer of layers 2–4 is busy; try again in 3 s"))
    answer = await ask(page, "Hi")
    await expect(answer).to_contain_text("No answer: every peer of layers 2–4 is busy; try again in 3 s.")
    await expect(page.get_by_role("button", name="Try again")).to_be_visible()


async def test_a_broken_connection_is_an_error_not_an_end(page: Page, gateway: FakeGateway) -> None:
    gate = asyncio.Event()
    gateway.script(Say("Half a"), Wait(gate), Drop())
    answer = await ask(page, "Hi")
    await expect(answer).to_contain_text("Half a")
    gate.set()
    await expect(answer).to_contain_text("The answer broke off: the connection to the gateway broke.")
    await expect(answer).to_contain_text("Half a")


async def test_the_page_finds_a_gateway_that_comes_back(browser: Browser, gateway: FakeGateway) -> None:
    async with visit(browser, gateway.url) as seen:
        await expect(seen.page.locator(".lane")).to_have_count(3)
        await gateway.stop()
        banner = seen.page.get_by_role("status")
        await expect(banner).to_contain_text("The gateway does not answer")

        await gateway.start()

        await expect(banner).to_be_empty()
        await expect(await ask(seen.page, "Back?")).to_contain_text("nothing to say")


async def test_missing_layers_are_named_with_the_command_that_helps(page: Page, gateway: FakeGateway) -> None:
    gateway.forget_models()
    gateway.serve("org/petal", 8, ann=(0, 4))
    await gateway.tell()

    await expect(page.get_by_text("No one serves layers 4–8 of org/petal yet.")).to_be_visible()
    command = "python -m peer --relay ws://127.0.0.1:8787 --model org/petal --layers 4:8"
    await expect(page.locator(".command code")).to_have_text(command)
    await expect(page.locator(".lane.gap")).to_contain_text("no one yet")
    await ask(page, "Hi")
    assert gateway.asked == []
    await expect(page.get_by_label("Message to the swarm")).to_have_value("Hi")


async def test_a_hostile_model_name_stays_out_of_the_command(page: Page, gateway: FakeGateway) -> None:
    gateway.forget_models()
    gateway.serve("org/x;rm -rf ~", 8, ann=(0, 4))
    await gateway.tell()

    await expect(page.get_by_text("No one serves layers 4–8")).to_be_visible()
    await expect(page.locator(".command code")).to_have_text(
        "python -m peer --relay ws://127.0.0.1:8787 --layers 4:8"
    )


async def test_an_empty_swarm_asks_for_a_machine(page: Page, gateway: FakeGateway) -> None:
    gateway.forget_models()
    await gateway.tell()
    await expect(page.get_by_role("heading", name="No one lends a machine yet.")).to_be_visible()
    await expect(page.locator(".command code")).to_have_text("python -m peer --relay ws://127.0.0.1:8787")


async def test_an_unreachable_relay_is_said(page: Page, gateway: FakeGateway) -> None:
    await gateway.tell(relay_connected=False)
    banner = page.get_by_role("status")
    await expect(banner).to_contain_text("cannot reach the relay at ws://127.0.0.1:8787")
    await gateway.tell(relay_connected=True)
    await expect(banner).to_be_empty()


# ---------------------------------------------------------------- hostile words


async def test_hostile_answers_do_nothing(browser: Browser, gateway: FakeGateway) -> None:
    async with open_page(browser, gateway) as seen:
        for answer in HOSTILE:
            gateway.script(Say(f"{answer}\n\nafter", characters=3))
            await expect(await ask(seen.page, "Say something bad")).to_contain_text("after")
            await send_button_is_back(seen.page)
            assert await dangers(seen.page) == [], answer
        await hover_everything(seen.page)
        assert await seen.executed() == []


async def test_hostile_names_and_messages_are_only_words(browser: Browser) -> None:
    bad = "<img src=x onerror=window.executed.push(1)>"
    async with FakeGateway() as gateway:
        gateway.serve(f"petal {bad}", 6, **{bad: (0, 6)})
        async with open_page(browser, gateway) as seen:
            gateway.script(Say("one"), Reroute(lost=bad, heir=f"{bad}2"), Say("two"), Fail(bad))
            answer = await ask(seen.page, bad)
            await expect(answer).to_contain_text(f"The answer broke off: {bad}")
            await expect(seen.page.get_by_test_id("route-sentence")).to_contain_text(bad)
            assert await seen.page.locator("img").count() == 0
            assert await seen.executed() == []


async def dangers(page: Page) -> list[str]:
    """Elements, attributes and links that no answer may bring onto the page."""
    found: list[str] = await page.evaluate(
        """() => [...document.querySelectorAll("article.answer .text *")].flatMap((element) => {
          const attributes = [...element.attributes].map(({name}) => name);
          const allowed = "A BLOCKQUOTE BR BUTTON CODE DEL DIV EM H1 H2 H3 H4 H5 H6 HR LI OL P PRE SPAN "
            + "STRONG TABLE TBODY TD TH THEAD TR UL";
          const link = element.getAttribute("href");
          return [
            ...(allowed.split(" ").includes(element.tagName) ? [] : [element.tagName]),
            ...attributes.filter((name) => /^on|^style$|^id$|^name$|^src/.test(name)),
            ...(link === null || /^(https?|mailto):/.test(link) ? [] : [link]),
          ];
        })"""
    )
    return found


async def hover_everything(page: Page) -> None:
    """What a reader's pointer and focus would set off."""
    await page.evaluate(
        """() => document.querySelectorAll("article.answer *").forEach((element) => {
          for (const kind of ["mouseover", "pointerenter", "focus", "toggle", "load"])
            element.dispatchEvent(new Event(kind, {bubbles: true}));
        })"""
    )


# ---------------------------------------------------------------- text that grows


GROWING = [
    MARKDOWN,
    "- a\n\n  more of a\n- b\n  1. deep\n\n     deeper\n\nout\n\n***\n\n> quote\nlazy\n\n> other",
    "Title\n=====\n\nSee [it][1] and [that].\n\n[1]: https://example.org/1\n[that]: https://example.org/2",
    "~~~\nopen fence\n\n# no title\n\nstill code",
    "a\tb\n\n\tindented code\n\n    more\n\nend  \nbroken line\\\nagain",
    "| a | b |\n|--|--|\n| 1 | 2 |\n| 3 |\n\n<div>\n\n*raw*\n\n</div>\n\n- [ ] open\n- [x] done",
]


async def test_text_that_grows_ends_like_text_that_was_there_at_once(page: Page) -> None:
    for source in GROWING:
        grown, whole = await grow(page, source)
        assert grown == whole


async def grow(page: Page, source: str) -> tuple[str, str]:
    """What a text looks like that came in pieces, and one that came whole."""
    grown, whole = await page.evaluate(
        """async (source) => {
          const { GrowingMarkdown } = await import("/static/markdown.js");
          const draw = () => new Promise(requestAnimationFrame);
          const [one, two] = [document.createElement("div"), document.createElement("div")];
          const growing = new GrowingMarkdown(one);
          for (let end = 1; end < source.length; end += 3) {
            growing.show(source.slice(0, end), false);
            await draw();
          }
          growing.show(source, true);
          new GrowingMarkdown(two).show(source, true);
          const shape = (home) => home.innerText.trim() + home.querySelectorAll(":not(span)").length;
          return [shape(one), shape(two)];
        }""",
        source,
    )
    return grown, whole


# ---------------------------------------------------------------- for everyone


async def test_a_small_phone_never_scrolls_sideways(browser: Browser, gateway: FakeGateway) -> None:
    wide = f"{'long' * 60}\n\n{MARKDOWN}\n\n```\n{'x' * 400}\n```\n\n|{'column|' * 30}\n|{'-|' * 30}\n"
    async with open_page(browser, gateway, viewport={"width": 360, "height": 640}) as seen:
        page = seen.page
        assert await sideways(page) == []
        gateway.script(Say(wide, characters=40))
        await ask(page, "word" * 60)
        await send_button_is_back(page)
        assert await sideways(page) == []

        await expect(page.locator(".lane").first).to_be_hidden()
        await page.get_by_role("button", name="Show the route").click()
        await expect(page.locator(".lane.lit")).to_have_count(3)
        await expect(page.locator(".lane.lit").first).to_be_visible()
        assert await sideways(page) == []


async def test_a_chat_needs_only_a_keyboard(page: Page, gateway: FakeGateway) -> None:
    await expect(page.get_by_label("Message to the swarm")).to_be_focused()
    gateway.script(Say("First "), Fail("a peer tripped"))
    gateway.script(Say(MARKDOWN))
    await page.keyboard.type("Hi")
    await page.keyboard.press("Enter")
    await expect(page.locator("article.answer")).to_contain_text("broke off")

    await page.keyboard.press("Shift+Tab")
    await expect(page.get_by_role("button", name="Try again")).to_be_focused()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert await page.evaluate(outline) == "solid"
    await page.keyboard.press("Enter")
    await expect(page.locator("article.answer .code")).to_be_visible()

    await page.keyboard.press("Control+Shift+O")
    await expect(page.locator("article")).to_have_count(0)
    await expect(page.get_by_label("Message to the swarm")).to_be_focused()


async def test_screen_readers_hear_sentences_not_tokens(page: Page, gateway: FakeGateway) -> None:
    text = "".join(f"This is sentence {number}. " for number in range(28))
    gateway.script(Say(text, every_s=0.012))
    await page.evaluate(
        """(length) => {
          window.heard = [];
          const region = document.querySelector("[aria-live=polite]");
          window.allHeard = new Promise((resolve) => new MutationObserver(() => {
            window.heard.push([performance.now(), region.textContent]);
            if (window.heard.map(([, words]) => words).join(" ").length >= length) resolve();
          }).observe(region, {subtree: true, characterData: true, childList: true}));
        }""",
        len(text.strip()),
    )
    await ask(page, "Talk")

    async with asyncio.timeout(10):
        await page.evaluate("window.allHeard")
    heard = await page.evaluate("window.heard")
    assert " ".join(words for _, words in heard) == text.strip()
    assert all(later - earlier > 950 for (earlier, _), (later, _) in itertools.pairwise(heard))
    log = page.get_by_role("log", name="Conversation")
    assert await log.get_attribute("aria-live") == "off"


async def test_the_page_has_landmarks_and_named_controls(page: Page, gateway: FakeGateway) -> None:
    await expect(await ask(page, "Hi")).to_contain_text("nothing to say")
    for role in ("banner", "main", "log"):
        await expect(page.get_by_role(role)).to_have_count(1)
    await expect(page.get_by_role("complementary", name="The route")).to_be_visible()
    nameless = await page.evaluate(
        """() => [...document.querySelectorAll("button, textarea, select, a, [role=img], [role=region]")]
          .filter((control) => !(control.ariaLabel || control.labels?.length || control.textContent.trim()
            || control.getAttribute("aria-labelledby")))
          .map((control) => control.outerHTML)"""
    )
    assert nameless == []
