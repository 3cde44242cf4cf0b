"""A lab that tests share. Without root or nftables they are skipped, and the reason is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from tests.harness.namespaces import why_unavailable
from tests.nat.lab import Lab
from tests.nat.participant import Participant, participant

Pair = tuple[Participant, Participant]


@pytest.fixture(scope="package", autouse=True)
def routers() -> None:
    """Skip all tests here where no routers can be built."""
    if why := why_unavailable():
        pytest.skip(why)


@pytest.fixture(scope="package")
def lab(routers: None) -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def pair(lab: Lab) -> AsyncIterator[Pair]:
    """A participant's process in each home of the lab."""
    async with AsyncExitStack() as stack:
        left = await stack.enter_async_context(participant(lab.left.machine))
        right = await stack.enter_async_context(participant(lab.right.machine))
        yield left, right
