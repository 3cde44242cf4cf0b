"""Who else serves an artefact, as the relays tell when they are asked once.

A peer does not watch: with a thousand of them, each would hear every renewal of all others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from peer.placement import Placed, placed
from shared.client.directory import Directory
from shared.errors import ConnectionLost
from shared.protocol import SignedRecord
from shared.relay_client import RelayClient
from shared.relays import Relays

log = logging.getLogger(__name__)


async def look_around(relays: Relays, model: str, artefact: str) -> list[Placed]:
    """All live peers of an artefact, as far as the relays that answer know them."""
    directory = Directory()
    clients = [client for client in relays.clients if client.connected.is_set()]
    for client, records in zip(
        clients, await asyncio.gather(*(_ask(client, model) for client in clients)), strict=True
    ):
        for record in records:
            directory.add(record, client.url)
    return placed([peer for peer in directory.live() if peer.artefact == artefact])


async def _ask(client: RelayClient, model: str) -> Sequence[SignedRecord]:
    try:
        return await client.lookup(model)
    except ConnectionLost as error:
        log.warning("who else serves %s is not known: %s", model, error)
        return []
