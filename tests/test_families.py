"""Every family answers through three peers as it does on one machine, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.models import FAMILIES, LAYERS, save_random
from tests.harness.swarm import Swarm, tokens

PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8, 101, 77, 29, 50, 2, 19, 64, 70, 9, 111, 23]


@pytest.mark.parametrize("family", FAMILIES)
async def test_three_peers_say_what_the_unsplit_model_says(family: str, tmp_path: Path) -> None:
    async with Swarm(save_random(family, tmp_path)) as swarm:
        third = LAYERS // 3
        await swarm.start(ann=(0, third), bob=(third, 2 * third), eve=(2 * third, LAYERS))

        answer = [event async for event in swarm.ask(PROMPT, new=24)]

        assert tokens(answer) == swarm.reference(PROMPT, new=24)
