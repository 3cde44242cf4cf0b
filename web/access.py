"""Who may talk to the gateway: programs of this machine, its own page, and hosts that its keeper named.

Without these checks any web page that someone has open could use a gateway on 127.0.0.1: directly, or by
letting its own name point here (DNS rebinding). Foreign pages read nothing unless the keeper named them, and
with keys only those who have one are answered.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from http import HTTPStatus

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from msgspec import Struct
from yarl import URL

from web.openai.errors import ApiError

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

NEEDS_KEY = ("/v1/", "/tokenize", "/detokenize")
"""Where a key is asked for, if there are any. The list of models and the view of the swarm stay open."""
OPEN = ("/v1/models",)

PREFLIGHT_S = 600
"""How long a foreign page's browser may remember what it was allowed."""
EXPOSED = "x-request-id, x-swarm-warning, x-swarm-route, Server-Timing, Retry-After, retry-after-ms"


class Access(Struct, frozen=True, kw_only=True):
    """Whom the keeper lets in."""

    hosts: Collection[str] = ()
    """Names beside localhost by which people reach this gateway."""
    origins: Collection[str] = ()
    """Foreign pages that may use it, as in https://chat.example.org."""
    keys: Collection[str] = ()
    """Who has one of these may ask; without any, everyone who comes in may."""


def check_access(
    host: str, origin: str | None, allowed: Collection[str], origins: Collection[str] = ()
) -> None:
    """Raises ApiError (403) unless the Host header is one of ours and the Origin is our own page or named."""
    name = _host_name(host)
    if name not in LOCAL_HOSTS and name not in allowed:
        raise ApiError(
            HTTPStatus.FORBIDDEN,
            f"this gateway does not go by the name {host[:200]!r}; its keeper can add it with --allow-host",
            code="host_not_allowed",
        )
    if origin is not None and origin not in origins and not _same_place(origin, host):
        raise ApiError(
            HTTPStatus.FORBIDDEN,
            f"pages of {origin[:200]!r} may not use this gateway",
            code="origin_not_allowed",
        )


def check_key(request: web.Request, keys: Collection[str]) -> None:
    """Raises ApiError (401) unless the request brings one of the keys, where it needs one."""
    path = request.path
    if not keys or not path.startswith(NEEDS_KEY) or path.startswith(OPEN):
        return
    sent = key_of(request).encode(errors="surrogateescape")
    # In the same time whatever was sent, so that nothing is learnt of a key by trying.
    if not any(hmac.compare_digest(sent, key.encode()) for key in keys):
        raise ApiError(
            HTTPStatus.UNAUTHORIZED,
            "this gateway asks for a key: send one of its keeper's as Authorization: Bearer or as x-api-key",
            code="invalid_api_key",
        )


def access_middleware(access: Access) -> Middleware:
    """Checks every request, the page's own files too."""
    names = frozenset(name.lower() for name in access.hosts)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        check_access(request.headers.get("Host", ""), origin, names, access.origins)
        if request.method == "OPTIONS" and origin in access.origins:
            return _preflight(request)
        check_key(request, access.keys)
        return await handler(request)

    return middleware


def allow_origin(access: Access, request: web.Request, response: web.StreamResponse) -> None:
    """Let the named foreign page read the response, errors and streams too."""
    if not access.origins:
        return
    response.headers["Vary"] = "Origin"
    if (origin := request.headers.get("Origin")) in access.origins and origin is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED


def _preflight(request: web.Request) -> web.Response:
    """What a browser asks before it sends a foreign page's request."""
    wanted = request.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type, x-api-key")
    return web.Response(
        status=HTTPStatus.NO_CONTENT,
        headers={
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": wanted,
            "Access-Control-Max-Age": str(PREFLIGHT_S),
        },
    )


def key_of(request: web.Request) -> str:
    """The API key that a request brings, in either way; empty without one."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")


def user_of(request: web.Request) -> str:
    """Whose question it is, for taking turns: by API key where one is sent, else by address."""
    key = key_of(request)
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest() if key else request.remote or ""


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
