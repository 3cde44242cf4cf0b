"""Who may talk to the gateway: programs of this machine, its own page, and hosts that its keeper named.

Without these checks any web page that someone has open could use a gateway on 127.0.0.1: directly, or by
letting its own name point here (DNS rebinding). No CORS header is ever sent, so foreign pages read nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from http import HTTPStatus

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from yarl import URL

from web.openai.errors import ApiError

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def check_access(host: str, origin: str | None, allowed: Collection[str]) -> None:
    """Raises ApiError (403) unless the Host header is one of ours and the Origin is our own page."""
    name = _host_name(host)
    if name not in LOCAL_HOSTS and name not in allowed:
        raise ApiError(
            HTTPStatus.FORBIDDEN,
            f"this gateway does not go by the name {host[:200]!r}; its keeper can add it with --allow-host",
            code="host_not_allowed",
        )
    if origin is not None and not _same_place(origin, host):
        raise ApiError(
            HTTPStatus.FORBIDDEN,
            f"pages of {origin[:200]!r} may not use this gateway",
            code="origin_not_allowed",
        )


def access_middleware(allowed: Collection[str]) -> Middleware:
    """Checks every request, the page's own files too."""
    names = frozenset(name.lower() for name in allowed)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        check_access(request.headers.get("Host", ""), request.headers.get("Origin"), names)
        return await handler(request)

    return middleware


def user_of(request: web.Request) -> str:
    """Whose question it is, for taking turns: by API key where one is sent, else by address."""
    key = request.headers.get("Authorization") or request.headers.get("x-api-key")
    return hashlib.sha256(key.encode()).hexdigest() if key else request.remote or ""


def _host_name(host: str) -> str | None:
    """Host header without its port, in lower case; None when it is no host."""
    try:
        return URL(f"http://{host}").host
    except ValueError:
        return None


def _same_place(origin: str, host: str) -> bool:
    """A proxy before us may speak https, so the scheme is not compared."""
    try:
        url = URL(origin)
        ports = {"http": 80, "https": 443}
        here = URL(f"{url.scheme}://{host}")
        return url.scheme in ports and (url.host, url.port) == (here.host, here.port)
    except ValueError:
        return False
