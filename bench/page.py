"""How smooth the page is while an answer streams: frames per second, and how busy its main thread is.

A headless Chromium shows the true page before a made-up gateway that streams tokens at a steady pace,
each with its hops. A loop in the page asks for every frame, so that frames which nothing needed do not count
as lost. All figures are from Chromium's own trace, over the middle of the answer.

`main_thread_busy` is the share of the time in which the main thread was inside a task, by the clock; on a
machine with other work that is more than the page needs, so `main_thread_cpu` is the same by the thread's own
processor time, where the trace tells it. `frame_ms_p95` is the time from one frame to the next.

    python -m bench.page [--tokens-per-s 60] [--seconds 10]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from statistics import quantiles
from typing import Any

from playwright.async_api import Browser, CDPSession, expect

from tests.harness.chromium import open_chromium, visit
from tests.harness.fake_gateway import FakeGateway, Say

Event = dict[str, Any]

CATEGORIES = ("toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline", "blink.user_timing")
WARM_UP_S = 2.0
"""Of streaming before the measured time: scripts are compiled and grammars fetched by then."""
TASK = ("RunTask", "ThreadControllerImpl::RunTask")
PIECE = 4
"""Characters of a token."""

PARAGRAPHS = """## Petals

A **corolla** is the ring of petals around the heart of a flower; each petal is *one layer* here.

1. the first peer reads the words
2. the last one draws the next, by `argmax`

```python
def petal(layer: int) -> float:
    return 6.28 * layer / 24  # where it stands
```

| peer | span  |
|------|-------|
| ann  | 0–8   |

"""

BEGINS, ENDS, FRAME = "bench begins", "bench ends", "bench frame"
"""Marks that the page sets in the trace."""
EVERY_FRAME = f"""() => requestAnimationFrame(function again() {{
  performance.mark({FRAME!r});
  requestAnimationFrame(again);
}})"""


async def measure(rate: float, seconds: float) -> dict[str, float]:
    """Stream one answer and trace the page in the middle of it."""
    async with FakeGateway() as gateway, open_chromium() as browser:
        gateway.serve("petal", 24, ann=(0, 8), bob=(8, 16), eve=(16, 24))
        tokens = round(rate * (seconds + 2 * WARM_UP_S))
        words = (PARAGRAPHS * (1 + tokens * PIECE // len(PARAGRAPHS)))[: tokens * PIECE]
        gateway.script(Say(words, characters=PIECE, every_s=1 / rate))
        async with visit(browser, gateway.url) as seen:
            page = seen.page
            await page.evaluate(EVERY_FRAME)
            await page.get_by_label("Message to the swarm").fill("What is a petal?")
            await page.keyboard.press("Enter")
            await expect(page.locator(".lane.lit")).to_have_count(3)
            await asyncio.sleep(WARM_UP_S)
            async with _traced(browser) as events:
                marks = await page.context.new_cdp_session(page)
                await _mark(marks, BEGINS)
                before, began = gateway.said, time.monotonic()
                await asyncio.sleep(seconds)
                pace = (gateway.said - before) / (time.monotonic() - began)
                await _mark(marks, ENDS)
    return {**figures(events), "tokens_per_s": round(pace, 1)}


@asynccontextmanager
async def _traced(browser: Browser) -> AsyncGenerator[list[Event], None]:
    """What Chromium writes down about itself inside the `async with`; the list is filled on leaving."""
    session = await browser.new_browser_cdp_session()
    events: list[Event] = []
    done = asyncio.Event()
    session.on("Tracing.dataCollected", lambda told: events.extend(told["value"]))
    session.on("Tracing.tracingComplete", lambda _: done.set())
    config = {"includedCategories": list(CATEGORIES), "excludedCategories": ["*"]}
    await session.send("Tracing.start", {"traceConfig": config, "transferMode": "ReportEvents"})
    yield events
    await session.send("Tracing.end")
    await done.wait()


async def _mark(session: CDPSession, name: str) -> None:
    await session.send("Runtime.evaluate", {"expression": f"void performance.mark({json.dumps(name)})"})


# ---------------------------------------------------------------- what a trace says


def figures(events: Sequence[Event]) -> dict[str, float]:
    """Frames and tasks of the marked thread, between its two marks."""
    begins, ends = (_marked(events, name) for name in (BEGINS, ENDS))
    begin, end = begins["ts"], ends["ts"]
    mine = [
        event
        for event in events
        if (event["pid"], event["tid"]) == (begins["pid"], begins["tid"]) and begin <= event["ts"] < end
    ]
    frames = sorted(event["ts"] for event in mine if event["name"] == FRAME)
    tasks = _outermost(event for event in mine if event["name"] in TASK and event.get("ph") == "X")
    between = [(later - earlier) / 1000 for earlier, later in pairwise(frames)]
    found = {
        "fps": round(len(frames) / (end - begin) * 1e6, 1),
        "frame_ms_p95": round(quantiles(between, n=20)[-1], 1),
        "main_thread_busy": round(sum(task["dur"] for task in tasks) / (end - begin), 3),
    }
    if any("tdur" in task for task in tasks):
        found["main_thread_cpu"] = round(sum(task.get("tdur", 0) for task in tasks) / (end - begin), 3)
    return found


def _marked(events: Iterable[Event], name: str) -> Event:
    found = next((event for event in events if event["name"] == name), None)
    if found is None:
        raise SystemExit(f"Chromium's trace lacks the mark {name!r}; run the benchmark again")
    return found


def _outermost(tasks: Iterable[Event]) -> list[Event]:
    """Tasks that are inside no other task: a nested loop runs tasks of its own."""
    found: list[Event] = []
    until = 0.0
    for task in sorted(tasks, key=lambda event: (event["ts"], -event["dur"])):
        if task["ts"] >= until:
            found.append(task)
            until = task["ts"] + task["dur"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens-per-s", type=float, default=60)
    parser.add_argument("--seconds", type=float, default=10, help="of the trace")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.tokens_per_s, options.seconds))))


if __name__ == "__main__":
    main()
