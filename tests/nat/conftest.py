"""A lab that tests share. Without root or nftables they are skipped, and the reason is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

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
    async with _at_home(lab) as pair:
        yield pair


@asynccontextmanager
async def people(lab: Lab) -> AsyncIterator[tuple[Lab, Participant, Participant]]:
    """A lab of one test's own, with a participant in each home."""
    with lab:
        async with _at_home(lab) as pair:
            yield lab, *pair


@asynccontextmanager
async def _at_home(lab: Lab) -> AsyncIterator[Pair]:
    async with participant(lab.left.machine) as left, participant(lab.right.machine) as right:
        yield left, right
