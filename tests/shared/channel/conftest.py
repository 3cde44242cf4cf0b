"""Every channel test leaves nothing behind: no task, and no error that only the event loop saw."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.channel import webrtc


@pytest.fixture(autouse=True, scope="session")
def quick_collections() -> None:
    """What was imported is never garbage: collecting takes a tenth of the time without it."""
    gc.freeze()


@pytest.fixture(params=["fast", "plain"])
def each_transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct links by our own transports, and by aiortc's."""
    wanted = webrtc.best_transports() if request.param == "fast" else webrtc.PLAIN
    monkeypatch.setattr(webrtc, "TRANSPORTS", wanted)


@pytest.fixture(autouse=True)
async def nothing_left_behind() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    yield
    # Futures whose error nobody looked at complain when they are collected.
    gc.collect()
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
    assert not complaints, f"the event loop complains: {complaints}"
