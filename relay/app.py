"""The relay as a whole: its routes, what runs in the background, and how it starts and ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from aiohttp import web

from relay.meeting import Meeting
from relay.names import host_is_ours
from relay.participants import Participant
from relay.sessions import MEETING, serve
from relay.settings import RelaySettings
from relay.status import SwarmPage, about, health
from relay.stun import stun_responders
from relay.tables import written_behind
from shared.errors import SettingsError
from shared.protocol import Restarting

log = logging.getLogger(__name__)

# Participants spread their return over about this time.
RETRY_AFTER_S = 2.0
# A login takes some 0.7 ms; half of a core is left to those who are back already.
RETURNS_PER_S = 700
SHUTDOWN_S = 2.0
SILENT_S = 20.0
"""A connection that has not become a WebSocket, and asks for no page, ends after this."""
# No request has a body.
MAX_REQUEST_BYTES = 4096

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(settings: RelaySettings, clock: Callable[[], float] = time.time) -> web.Application:
    """The relay as an aiohttp application, for any aiohttp runner. `clock` gives seconds since 1970."""
    app = web.Application(middlewares=[_answer_to_own_names], client_max_size=MAX_REQUEST_BYTES)
    app[MEETING] = Meeting(settings, clock)
    app.router.add_get("/", about)
    app.router.add_get("/healthz", health)
    app.router.add_get("/api/swarm", SwarmPage().serve)
    app.router.add_get("/ws", serve)
    app.cleanup_ctx.append(_in_background)
    app.on_shutdown.append(_say_goodbye)
    return app


class Relay:
    """A running relay: `async with Relay(settings) as relay: relay.url, relay.stun_port`.

    Entering raises SettingsError when a port or the database cannot be had.
    """

    def __init__(self, settings: RelaySettings | None = None, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings or RelaySettings()
        self._app = create_app(self.settings, clock)
        self._runner = web.AppRunner(
            # No access log: it would be a list of who talked when, from which address.
            self._app,
            access_log=None,
            shutdown_timeout=SHUTDOWN_S,
            # Also for those that connect and never ask anything.
            keepalive_timeout=SILENT_S,
            handler_cancellation=True,
        )
        self.port = 0

    async def __aenter__(self) -> Self:
        settings = self.settings
        try:
            await self._runner.setup()
            site = web.TCPSite(self._runner, settings.host or None, settings.port, backlog=1024)
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error};"
                " choose another --port"
            ) from None
        except BaseException:
            await self._runner.cleanup()
            raise
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @property
    def meeting(self) -> Meeting:
        return self._app[MEETING]

    @property
    def stun_port(self) -> int:
        """UDP port of the STUN responder; 0 without one."""
        return self.meeting.stun_ports[0]

    @property
    def url(self) -> str:
        """Where participants on this machine, or on its network, reach it."""
        host = self.settings.host
        if host in ("", "0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


async def _in_background(app: web.Application) -> AsyncIterator[None]:
    """The database, the STUN responder and the tasks that run as long as the application does."""
    meeting = app[MEETING]
    settings = meeting.settings
    if meeting.names is None:
        log.warning("listening everywhere without --name: logins are not bound to this relay's host name")
    async with AsyncExitStack() as stack:
        if settings.database is not None:
            meeting.writer, entries = await stack.enter_async_context(
                written_behind(settings.database, meeting.clock)
            )
            meeting.restore(entries)
        if settings.stun:
            wanted = settings.port if settings.stun_port is None else settings.stun_port
            second = settings.second_stun_port
            meeting.stun_ports = await stack.enter_async_context(
                stun_responders(settings.host, wanted, _port_after(wanted) if second is None else second)
            )
        # Not a TaskGroup: aiohttp may end the application from another task than it started in.
        tasks = [asyncio.create_task(work) for work in (meeting.tell_news(), meeting.tidy(), meeting.weigh())]
        stack.push_async_callback(_stop, tasks)
        yield


def _port_after(port: int) -> int:
    """0, which takes a free one, stays 0."""
    return port + 1 if 0 < port < 65535 else 0


async def _stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            log.error("a background task of the relay had failed", exc_info=outcome)


async def _say_goodbye(app: web.Application) -> None:
    """Tell everyone to come back soon, so that they need not guess why the connection ended."""
    participants = app[MEETING].participants.all()
    goodbye = Restarting(max(RETRY_AFTER_S, len(participants) / RETURNS_PER_S))

    async def part(participant: Participant) -> None:
        participant.send(goodbye)
        await participant.close()

    async with asyncio.TaskGroup() as tasks:
        for participant in participants:
            tasks.create_task(part(participant))


@web.middleware
async def _answer_to_own_names(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests for another host name, except the health check, which asks by address."""
    if request.path == "/healthz" or host_is_ours(request.host, request.app[MEETING].names):
        return await handler(request)
    raise web.HTTPMisdirectedRequest(
        text="this relay does not go by that host name; its operator can add it with --name\n"
    )
