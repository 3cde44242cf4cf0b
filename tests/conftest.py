"""What tests of several rooms begin with; a folder's own conftest.py may say it in another way.

The model is imported where it is wanted, so that tests of the relay or the page do not wait for torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness.swarm import Swarm


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights."""
    from tests.harness.models import save_random

    return save_random("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def swarm(llama: Path) -> AsyncIterator[Swarm]:
    """A swarm without peers yet, whose model is the tiny Llama."""
    from tests.harness.swarm import Swarm

    async with Swarm(llama) as swarm:
        yield swarm
