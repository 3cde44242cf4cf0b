"""Whether the page stays smooth while an answer comes fast: its frames a second, and its main thread's load.

A gateway that answers by a script streams a long markdown answer, each token with its hops, and a headless
Chromium draws it. `main_thread_busy` is Chromium's own count of the time spent in tasks; `fps` counts
animation frames, which makes the browser draw even where nothing changed, so the load is a little overstated.
Others who use the machine disturb both.

    python -m bench.page --tokens-per-s 60 --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import json

from playwright.async_api import CDPSession, Page

from tests.harness.chromium import open_chromium, visit
from tests.harness.fake_gateway import FakeGateway, Say

LAYERS = 24
SPANS = {"ann": (0, 5), "bob": (5, 10), "eve": (10, 15), "max": (15, 20), "zoe": (20, 24)}
CHARACTERS = 4
"""Of one token: about what they have in English."""

PARAGRAPH = """## How a flower opens

A corolla is *all the petals* of a flower **taken together**, and each petal holds a `layer`:

1. the first layers read your words,
2. the last ones write the answer.

| peer | layers |
|------|--------|
| ann  | 0–5    |

```python
def petal(layer: int) -> str:
    return f"petal {layer}"
```

"""

_COUNT_FRAMES = """
window.frames_drawn = 0;
const count = () => { window.frames_drawn++; requestAnimationFrame(count); };
requestAnimationFrame(count);
"""


async def measure(tokens_per_s: float, seconds: float) -> dict[str, float]:
    """Watch the page through one answer, from its first tokens to its last."""
    length = int(tokens_per_s * seconds * CHARACTERS)
    words = (PARAGRAPH * (1 + length // len(PARAGRAPH)))[:length]
    async with FakeGateway() as gateway, open_chromium() as browser:
        gateway.serve("petal", LAYERS, **SPANS)
        async with visit(browser, gateway.url) as seen:
            page = seen.page
            tool = await page.context.new_cdp_session(page)
            await tool.send("Performance.enable")
            gateway.script(Say(words, characters=CHARACTERS, every_s=1 / tokens_per_s))
            await page.get_by_label("Message to the swarm").fill("How does a flower open?")
            await page.keyboard.press("Enter")
            await page.locator("article.answer.streaming").wait_for()
            return await watch(page, tool, seconds)


async def watch(page: Page, tool: CDPSession, seconds: float) -> dict[str, float]:
    """What the browser counts until the answer is over."""
    await page.evaluate(_COUNT_FRAMES)
    before = await counters(tool)
    await page.locator("article.answer.done").wait_for(timeout=seconds * 10_000)
    after = await counters(tool)
    frames: int = await page.evaluate("window.frames_drawn")
    passed = after["Timestamp"] - before["Timestamp"]
    busy = after["TaskDuration"] - before["TaskDuration"]
    tokens = await page.locator(".numbers dd").nth(2).inner_text()
    return {
        "fps": round(frames / passed, 1),
        "main_thread_busy": round(busy / passed, 3),
        "tokens_per_s": round(int(tokens) / passed, 1),
        "seconds": round(passed, 1),
    }


async def counters(tool: CDPSession) -> dict[str, float]:
    found = await tool.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in found["metrics"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how smooth the page is while an answer streams.")
    parser.add_argument("--tokens-per-s", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measure(given.tokens_per_s, given.seconds))))


if __name__ == "__main__":
    main()
