"""A swarm of OS processes, started by the commands that people type; the client that asks lives here.

async with ProcessSwarm(model, folder) as swarm:
    ann = await swarm.start("ann", "0:3")
    await swarm.until_covered()
    os.kill(ann.process.pid, signal.SIGKILL)
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.client.session import Drawn, Request, Rerouted
from shared.client.swarm_client import SwarmClient
from shared.identity import Identity, PeerId
from shared.protocol import Sampling
from tests.harness.swarm import until
from web.children import Child, Children, room_command

READY_S = 120.0
"""A busy machine loads torch once for each peer."""


class ProcessSwarm:
    """One relay and any number of peers, each a process with its log in `folder`. Leaving ends them all."""

    def __init__(self, model: Path, folder: Path, *, threads: int = 1, direct: bool = True) -> None:
        self.model = model
        self.client: SwarmClient
        self.children: dict[str, Child] = {}
        self.relay_url = ""
        self._folder = folder
        self._threads = threads
        self._direct = direct
        self._processes: Children
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Tests kill them on purpose; who waits in vain is told how they ended.
            self._processes = await stack.enter_async_context(Children(self._folder, lambda _: None))
            command = room_command("relay", "--host", "127.0.0.1", "--port", "0", "--stun-port", "0")
            relay, line = await self._processes.start_and_hear("relay", command)
            found = re.search(r"https?://[^\s,]+", line)
            assert found, f"the relay did not start: {line} {relay.log.read_text()}"
            self.relay_url = found[0]
            self.client = await stack.enter_async_context(
                SwarmClient(Identity.generate(), self.relay_url, direct=self._direct)
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def start(self, name: str, layers: str) -> Child:
        """Start a peer and wait until the client sees it serve."""
        command = room_command("peer", "--relay", self.relay_url, "--model", str(self.model), "--name", name)
        command += ["--layers", layers, "--threads", str(self._threads), "--kv-memory", "1GB"]
        # Exact weights: answers are compared with the unsplit model's, and times with its float32.
        command += ["--quantize", "none"]
        child = await self._processes.start(name, [*command, *([] if self._direct else ["--relay-only"])])
        self.children[name] = child
        await self.until(lambda: name in self.serving())
        return child

    def serving(self) -> set[str]:
        """The names of the peers that take sessions now."""
        return {live.name for live in self.client.directory.live() if live.state == "serving"}

    def name(self, peer: str) -> str:
        return self.client.directory.name(PeerId(peer))

    def route(self) -> list[str]:
        """The peers by which the client's only answer goes."""
        [generation] = self.client._generations.values()
        return [self.name(span.peer) for span in generation.route]

    def behind(self) -> dict[str, int]:
        """Who follows an answer of the client, and how many positions each still lacks."""
        lags = [each.behind for each in self.client._generations.values()]
        return {self.name(peer): lag for each in lags for peer, lag in each.items()}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the directory shows; a peer that ended meanwhile tells its last words."""
        try:
            await until(self.client.directory, condition, READY_S)
        except TimeoutError:
            ended = [child.obituary() for child in self.children.values() if not child.running]
            raise AssertionError(f"the peers did not come up in {READY_S:.0f} s; {ended}") from None

    def ask(
        self,
        prompt: Sequence[int],
        *,
        new: int,
        sampling: Sampling | None = None,
        reserved: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[Drawn | Rerouted, None]:
        """Tokens through the best route there is; never stops early. `reserved`: see SwarmClient."""
        model = self.client.directory.models()[0]
        request = Request(
            artefact=model.artefact,
            prompt=list(prompt),
            max_new_tokens=new,
            sampling=sampling or Sampling(),
        )
        return self.client.generate(request, reserved)
