"""`python -m web --demo`: a whole swarm on this machine. A relay, peers and the page, each its own process.

It starts what people would start by hand on several machines, with the same commands.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from rich.console import Console

from shared.client.swarm_client import SwarmClient
from shared.errors import CorollaError
from shared.identity import Identity
from shared.spans import Span
from web.app import Gateway, GatewaySettings
from web.children import Child, Children, room_command

NAMES = ("ann", "bob", "eve", "kim", "leo", "mia")
"""As many peers as the demo model has layers."""
START_S = 120.0
"""A slow machine loads torch once per peer."""


class DemoFailed(CorollaError):
    """The demo could not start, or cannot go on."""


@asynccontextmanager
async def demo(
    settings: GatewaySettings, peers: int, console: Console, *, direct: bool = True, log_level: str = "info"
) -> AsyncGenerator[Gateway, None]:
    """The page, once the peers cover the model. Raises DemoFailed, or SettingsError for a taken port."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corolla-demo-")))
        running = _Demo(console, log_level)
        children = await stack.enter_async_context(Children(folder, running.child_ended))
        relay_url = await running.start_relay(children)
        swarm = await stack.enter_async_context(SwarmClient(Identity.generate(), relay_url, direct=direct))
        gateway = await stack.enter_async_context(Gateway(settings, swarm))
        await running.start_peers(children, relay_url, NAMES[:peers], direct=direct)
        await running.until_covered(swarm)
        yield gateway


class _Demo:
    """What happens, told on the terminal."""

    def __init__(self, console: Console, log_level: str) -> None:
        self._console = console
        self._log_level = log_level
        self._changed = asyncio.Event()
        self._ended: list[Child] = []
        self._started = False

    def child_ended(self, child: Child) -> None:
        self._ended.append(child)
        self._changed.set()
        if self._started:
            self._console.print(f"{child.obituary()}; the demo goes on", style="yellow", markup=False)

    async def start_relay(self, children: Children) -> str:
        command = room_command("relay", "--host", "127.0.0.1", "--port", "0", "--stun-port", "0")
        child, line = await children.start_and_hear("relay", [*command, "--log-level", self._log_level])
        found = re.search(r"https?://[^\s,]+", line)
        if found is None:
            await child.process.wait()
            raise DemoFailed(f"the relay did not start: {child.obituary()}")
        self._console.print(f"relay at {found[0]}")
        return found[0]

    async def start_peers(
        self, children: Children, relay_url: str, names: Sequence[str], *, direct: bool
    ) -> None:
        """Each lends an equal part of the built-in model, on one core."""
        for number, name in enumerate(names, 1):
            command = room_command("peer", "--relay", relay_url, "--name", name, "--threads", "1")
            command += ["--layers", f"{number}/{len(names)}", "--kv-memory", "256MB"]
            # All on this machine: no port needs to be open to the network.
            command += ["--listen", "off"]
            command += ["--log-level", self._log_level, *([] if direct else ["--relay-only"])]
            await children.start(name, command)

    async def until_covered(self, swarm: SwarmClient) -> None:
        seen: set[str] = set()
        unlisten = swarm.directory.listen(self._changed.set)
        try:
            with self._console.status("waiting for the peers to load their layers"):
                async with asyncio.timeout(START_S):
                    while not any(model.covered for model in swarm.directory.models()):
                        self._check_alive()
                        await self._changed.wait()
                        self._changed.clear()
                        self._tell_peers(swarm, seen)
            self._started = True
        except TimeoutError:
            raise DemoFailed(f"the peers did not cover the model within {START_S:.0f} s") from None
        finally:
            unlisten()

    def _tell_peers(self, swarm: SwarmClient, seen: set[str]) -> None:
        for model in swarm.directory.models():
            for peer in model.serving:
                if peer.peer not in seen:
                    seen.add(peer.peer)
                    layers = f"layers {Span(peer.start, peer.end)} of {peer.layer_count}"
                    self._console.print(f"{peer.name} serves {layers}", markup=False)

    def _check_alive(self) -> None:
        """Before the start every layer is needed, and each peer has its own."""
        if self._ended:
            raise DemoFailed(f"the demo could not start: {self._ended[0].obituary()}")
