"""The page's files, and what browsers may do with them."""

from __future__ import annotations

import base64
import hashlib
import re
from http import HTTPStatus
from pathlib import Path

from aiohttp import web

STATIC = Path(__file__).parent / "static"

_IMPORT_MAP = re.compile(rb"""<script\s+type=["']importmap["']\s*>(.*?)</script>""", re.DOTALL)

# The system's own table may lack these or name them wrongly (Windows keeps it in the registry), and with
# `nosniff` a script of the wrong type does not run.
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}


class Page:
    """index.html and the files under static/, with the headers that keep foreign scripts out."""

    def __init__(self, folder: Path = STATIC) -> None:
        self._folder = folder
        index = folder / "index.html"
        self._index = index.read_bytes() if index.exists() else None
        self._policy = content_security_policy(self._index or b"")

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/", self._get_index)
        if self._folder.is_dir():
            router.add_static("/static/", self._folder)

    async def finish_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """A signal: runs before any response is sent, also for errors and for the API."""
        response.headers["Content-Security-Policy"] = self._policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if request.path.startswith("/static/") and response.status == HTTPStatus.OK:
            # Files keep their names between versions; asking whether they changed is cheap.
            response.headers["Cache-Control"] = "no-cache"
            if kind := _TYPES.get(Path(request.path).suffix):
                response.headers["Content-Type"] = f"{kind}; charset=utf-8" if "font" not in kind else kind

    async def _get_index(self, request: web.Request) -> web.Response:
        if self._index is None:
            raise web.HTTPNotFound
        return web.Response(
            body=self._index,
            content_type="text/html",
            charset="utf-8",
            headers={"Cache-Control": "no-cache"},
        )


def content_security_policy(index: bytes) -> str:
    """Only our own files, and the one inline script of the page: its import map, by its hash."""
    maps = [
        f" 'sha256-{base64.b64encode(hashlib.sha256(found).digest()).decode()}'"
        for found in _IMPORT_MAP.findall(index)
    ]
    return "; ".join([
        "default-src 'none'",
        f"script-src 'self'{''.join(maps)}",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "form-action 'none'",
    ])  # fmt: skip
