"""An answer goes on, token for token, when the direct path that it travels on is cut."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tests.harness.commands import ROOT, python, started
from tests.harness.models import save_random
from tests.harness.namespaces import Namespace
from tests.harness.swarm import reference
from tests.nat.asker import Ask, Drew
from tests.nat.lab import Lab

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.slow]

PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]
NEW = 300
"""Far more than the ring may run ahead of its reader."""
BEFORE_THE_CUT = 5


async def test_an_answer_goes_on_when_its_direct_path_is_cut(lab: Lab, tmp_path: Path) -> None:
    model = save_random("llama", tmp_path)
    for home in (lab.left, lab.right):
        home.router.become("cone")
    peers = [
        home.machine.command(*peer(lab, model, layers))
        for home, layers in ((lab.left, "0:3"), (lab.right, "3:6"))
    ]
    with started(*peers, says="serving"):
        answer = []
        async for drew in asked(lab.left.machine, Ask(lab.relay_url, PROMPT, NEW, hops=2)):
            answer.append(drew)
            if len(answer) == BEFORE_THE_CUT:
                lab.left.router.cut_udp()

    assert [drew.token for drew in answer] == reference(model, PROMPT, NEW)
    assert answer[0].paths == ["direct", "direct"]
    assert answer[-1].paths == ["relayed", "relayed"]


def peer(lab: Lab, model: Path, layers: str) -> list[str]:
    return python(
        "peer", "--relay", lab.relay_url, "--model", str(model), "--layers", layers, "--threads", "1"
    )


async def asked(machine: Namespace, ask: Ask) -> AsyncIterator[Drew]:
    """The answer, token by token, as it comes to someone on that machine."""
    command = machine.command(*python("tests.nat.asker", msgspec.json.encode(ask).decode()))
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=PIPE)
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            yield msgspec.json.decode(line, type=Drew)
    except BaseException:
        process.kill()
        raise
    finally:
        await process.wait()
