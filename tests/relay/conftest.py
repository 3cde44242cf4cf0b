"""A real relay on loopback for each test; it starts in a few milliseconds."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from relay.app import Relay
from relay.settings import RelaySettings


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    async with Relay(RelaySettings(port=0)) as running:
        yield running
