"""The gateway as one thing to open and close: the page, the API and the view of the swarm, over HTTP."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson
from aiohttp import web
from msgspec import Struct
from yarl import URL

from shared.errors import SettingsError
from web.access import LOCAL_HOSTS, Access, access_middleware, allow_origin
from web.event_stream import KEEPALIVE_S, EventStream
from web.history import History
from web.line import PATIENCE_S, WaitingLines
from web.openai.asking import Asker
from web.openai.chat import ChatCompletions
from web.openai.completions import Completions
from web.openai.errors import errors_as_json
from web.openai.messages import Messages
from web.openai.models import Models
from web.openai.openapi import get_openapi
from web.openai.responses import Responses
from web.openai.tokenizing import Tokenizing
from web.page import STATIC, Page
from web.swarm import Swarm
from web.swarm_view import SwarmFeed, swarm_view
from web.tokenizer_cache import TokenizerCache

MAX_REQUEST_BYTES = 16 * 2**20
"""A conversation that fills a context of a million tokens, with room for tools."""
SHUTDOWN_S = 0.5
"""How long answers that are under way may still take when the gateway closes; then they are cut off."""


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """Where the gateway listens, and how it behaves there."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes any free one; `Gateway.url` says which."""
    data_dir: Path | None = None
    """Where tokenizers are kept for the next start; a folder that goes with the gateway when None."""
    allowed_hosts: tuple[str, ...] = ()
    """Names beside localhost under which people reach this gateway."""
    cors_origins: tuple[str, ...] = ()
    """Foreign pages that may use this gateway."""
    api_keys: tuple[str, ...] = ()
    """Who asks has to bring one of them; none are asked for when empty."""
    keepalive_s: float = KEEPALIVE_S
    patience_s: float = PATIENCE_S
    """How long a question waits for room when the swarm is full."""
    static: Path = STATIC


class Gateway:
    """async with Gateway(GatewaySettings(), swarm) as gateway: print(gateway.url)"""

    def __init__(self, settings: GatewaySettings, swarm: Swarm) -> None:
        self.url = ""
        self._settings = settings
        self._swarm = swarm
        self._feed = SwarmFeed(swarm)
        self._history = History(swarm)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises SettingsError when the address cannot be used."""
        async with AsyncExitStack() as stack:
            folder = self._settings.data_dir
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corolla-")))
            await stack.enter_async_context(self._feed.running())
            await stack.enter_async_context(self._history.running())
            # Without handler_cancellation an answer that nobody waits for any more would run to its end.
            runner = web.AppRunner(
                self._app(folder / "tokenizers"),
                handler_cancellation=True,
                access_log=None,
                shutdown_timeout=SHUTDOWN_S,
            )
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await self._listen(runner)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def _listen(self, runner: web.AppRunner) -> None:
        host, port = self._settings.host, self._settings.port
        check_exposure(host, self._settings.allowed_hosts)
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            # asyncio wraps the system's words in its own; name look-ups have numbers below zero.
            number = error.errno or 0
            reason = os.strerror(number) if number > 0 else error.strerror
            raise SettingsError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from None
        bound = runner.addresses[0][1]
        self.url = str(URL.build(scheme="http", host=_reachable(host), port=bound))

    # ------------------------------------------------------------ the app

    def _app(self, tokenizers: Path) -> web.Application:
        access = Access(
            hosts=self._settings.allowed_hosts,
            origins=self._settings.cors_origins,
            keys=self._settings.api_keys,
        )
        app = web.Application(
            middlewares=[errors_as_json, access_middleware(access)],
            client_max_size=MAX_REQUEST_BYTES,
        )
        page = Page(self._settings.static)
        models = Models(self._swarm, self._feed)
        lines = WaitingLines(self._swarm, patience_s=self._settings.patience_s)
        asker = Asker(self._swarm, lines, models, TokenizerCache(self._swarm, tokenizers))
        chat = ChatCompletions(asker, self._settings.keepalive_s)
        completions = Completions(asker, self._settings.keepalive_s)
        responses = Responses(asker, self._settings.keepalive_s)
        messages = Messages(asker, self._settings.keepalive_s)
        tokenizing = Tokenizing(asker)
        page.add_routes(app.router)
        app.router.add_get("/healthz", self._get_health)
        app.router.add_get("/api/swarm", self._get_swarm)
        app.router.add_get("/api/swarm/events", self._get_swarm_events)
        app.router.add_get("/api/history", self._get_history)
        app.router.add_get("/openapi.json", get_openapi)
        app.router.add_get("/v1/models", models.get_list)
        app.router.add_get("/v1/models/{id:.+}", models.get_one)
        app.router.add_post("/v1/chat/completions", chat.post)
        app.router.add_post("/v1/completions", completions.post)
        app.router.add_post("/v1/responses", responses.post)
        app.router.add_post("/v1/messages", messages.post)
        app.router.add_post("/v1/messages/count_tokens", messages.count_tokens)
        app.router.add_post("/tokenize", tokenizing.tokenize)
        app.router.add_post("/detokenize", tokenizing.detokenize)
        app.router.add_get("/tokenizer_info", tokenizing.info)
        app.on_response_prepare.append(page.finish_headers)
        app.on_response_prepare.append(_name_request)
        app.on_response_prepare.append(partial(_allow_origin, access))
        app.on_shutdown.append(self._end_feed)
        return app

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _get_swarm(self, request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(swarm_view(self._swarm)))

    async def _get_history(self, request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(self._history.view()))

    async def _get_swarm_events(self, request: web.Request) -> web.StreamResponse:
        stream = await EventStream.open(request)
        async for view in self._feed.views(self._settings.keepalive_s):
            await (stream.keep_alive() if view is None else stream.send_raw(view))
        return await stream.close()

    async def _end_feed(self, app: web.Application) -> None:
        await self._feed.close()


async def _allow_origin(access: Access, request: web.Request, response: web.StreamResponse) -> None:
    allow_origin(access, request, response)


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    """Clients quote this id in their reports."""
    response.headers["x-request-id"] = f"req_{secrets.token_hex(12)}"


def check_exposure(host: str, allowed_hosts: tuple[str, ...]) -> None:
    """Raises SettingsError for an address that others can reach, unless the names they use are given."""
    if host not in LOCAL_HOSTS and not allowed_hosts:
        raise SettingsError(
            f"--host {host} lets other machines in: say under which names they come, "
            "as in --allow-host chat.example.org"
        )


def _reachable(host: str) -> str:
    """An address to open, for one to listen on."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
