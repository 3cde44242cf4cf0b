"""A relay process collects its garbage when connections have ended, not while they live on."""

from __future__ import annotations

import asyncio
import gc

import pytest

import relay.garbage
from relay.garbage import collect_seldom
from relay.meeting import Meeting
from relay.settings import RelaySettings


async def test_it_waits_until_enough_connections_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay.garbage, "LOOK_EVERY_S", 0.001)
    collected = asyncio.Event()
    monkeypatch.setattr(gc, "collect", collected.set)
    before = gc.get_threshold()
    meeting = Meeting(RelaySettings())
    collecting = asyncio.create_task(collect_seldom(meeting))
    meeting.counts.logins = relay.garbage.LEAST_ENDED - 1
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collected.wait(), 0.05)
    assert gc.get_threshold()[2] > 1_000_000

    meeting.counts.logins += 1
    await asyncio.wait_for(collected.wait(), 5)
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)
    assert gc.get_threshold() == before
