"""A model hub on this machine: as much of its HTTP as a download asks for, and a list of what was fetched."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0" * 20


class Hub:
    """Serves one directory as the model `name`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.fetched: list[str] = []
        """Files sent, in order."""
        self.endpoint = ""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        """Listens on a free port inside the `with`."""
        http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.endpoint = f"http://127.0.0.1:{http.server_port}"
        try:
            yield self
        finally:
            http.shutdown()
            http.server_close()
            thread.join()

    def listing(self) -> list[dict[str, object]]:
        """The files, as the hub's tree tells them."""
        return [
            {
                "type": "file",
                "path": path.name,
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(self.directory.iterdir())
        ]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, with_body: bool) -> None:
                path = self.path.partition("?")[0]
                if path == f"/api/models/{hub.name}/revision/main":
                    self._send(
                        json.dumps({"id": hub.name, "sha": COMMIT, "siblings": []}).encode(), with_body
                    )
                elif path == f"/api/models/{hub.name}/tree/{COMMIT}":
                    self._send(json.dumps(hub.listing()).encode(), with_body)
                elif path.startswith(f"/{hub.name}/resolve/{COMMIT}/"):
                    file = hub.directory / path.rsplit("/", 1)[1]
                    if not file.is_file():
                        self._send(b"", with_body, 404, {"X-Error-Code": "EntryNotFound"})
                        return
                    if with_body:
                        hub.fetched.append(file.name)
                    self._send(file.read_bytes(), with_body)
                else:
                    self._send(b"{}", with_body, 404, {"X-Error-Code": "RepoNotFound"})

            def _send(
                self, body: bytes, with_body: bool, status: int = 200, headers: dict[str, str] | None = None
            ) -> None:
                self.send_response(status)
                known = {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(body)),
                    "X-Repo-Commit": COMMIT,
                    "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                }
                for name, value in {**known, **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Tests are quiet."""

        return Handler
