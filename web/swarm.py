"""What the gateway needs of a swarm. `SwarmClient` is the real one; tests bring their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Protocol

from shared.channel import PathReport
from shared.client.directory import Directory
from shared.client.session import Drawn, Request, Rerouted
from shared.identity import PeerId
from shared.protocol import Path


class Relay(Protocol):
    """The connection to a relay, as far as the page shows it."""

    url: str
    connected: asyncio.Event


class Swarm(Protocol):
    """Who is there, and how to ask them."""

    @property
    def directory(self) -> Directory: ...

    @property
    def relays(self) -> Iterable[Relay]:
        """At least one; the one that answers fastest comes first."""

    def generate(
        self, request: Request, reserved: Callable[[], None] = ...
    ) -> AsyncGenerator[Drawn | Rerouted, None]:
        """Tokens and re-routes until the answer is complete. Raises NoRoute, NoRoom, Busy or SessionFailed.

        `reserved` is called when every hop of a route has room for all of it.
        """

    async def fetch_files(self, artefact: str) -> Mapping[str, bytes]:
        """The tokenizer files of an artefact. Raises NoRoute or ConnectionLost."""

    def links(self) -> Mapping[PeerId, tuple[Path, float | None]]:
        """Open channels: what carries each now, and its round trip in ms when measured."""

    def path_reports(self) -> Mapping[PeerId, PathReport]:
        """Open channels: what carries each now, and why nothing better does."""
