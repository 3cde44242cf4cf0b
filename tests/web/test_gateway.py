"""The gateway's doors: who may come in, what every response carries, and how it opens and closes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest

from shared.errors import SettingsError
from tests.harness.fake_swarm import FakeSwarm, Pause, Say
from tests.web.api import CHAT, chat
from web.access import check_access
from web.app import Gateway, GatewaySettings
from web.openai.errors import ApiError
from web.page import content_security_policy


@pytest.fixture
def static(tmp_path: Path) -> Path:
    """A page of a few files."""
    (tmp_path / "vendor").mkdir()
    for name in ("app.js", "vendor/preact.mjs", "style.css", "petal.svg", "notes.txt"):
        (tmp_path / name).write_text("/* a file */")
    (tmp_path / "index.html").write_text(
        """<!doctype html><title>Petals</title><script type="importmap">{"imports": {}}</script>"""
    )
    return tmp_path


# ---------------------------------------------------------------- who may come in


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "[::1]:8080", "chat.example:80"]
)
def test_our_own_names_may_come_in(host: str) -> None:
    check_access(host, None, {"chat.example"})
    check_access(host, f"http://{host}", {"chat.example"})


@pytest.mark.parametrize(
    "host",
    ["", "evil.test", "evil.test:8080", "localhost.evil.test", "127.0.0.1.nip.io", "10.0.0.1", "a b", "["],
)
def test_other_names_may_not(host: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_access(host, None, {"chat.example"})
    assert (refused.value.status, refused.value.code) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.test",
        "http://localhost",
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "https://localhost.evil.test:8080",
        "file://",
        "x",
        "http://[",
    ],
)
def test_pages_from_elsewhere_may_not(origin: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_access("localhost:8080", origin, ())
    assert (refused.value.status, refused.value.code) == (403, "origin_not_allowed")


def test_a_proxy_may_speak_https_before_us() -> None:
    check_access("chat.example", "https://chat.example", {"chat.example"})


async def test_every_address_is_behind_the_door(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    for path in ("/", "/healthz", "/api/swarm", "/api/swarm/events", "/v1/models", "/nowhere"):
        for headers in ({"Host": "evil.test"}, {"Origin": "http://evil.test"}):
            async with http.get(path, headers=headers) as response:
                assert response.status == 403, path
                assert not any(name.startswith("Access-Control") for name in response.headers)
    async with http.post(CHAT, json=chat(), headers={"Origin": "http://evil.test"}) as response:
        assert response.status == 403
    async with http.options(CHAT, headers={"Origin": "http://evil.test"}) as response:
        assert response.status == 403
    assert not swarm.requests


async def test_other_machines_are_let_in_by_name_only(swarm: FakeSwarm) -> None:
    with pytest.raises(SettingsError, match="--allow-host"):
        async with Gateway(GatewaySettings(host="0.0.0.0"), swarm):
            pass
    settings = GatewaySettings(host="0.0.0.0", allowed_hosts=("Chat.Example",))
    async with Gateway(settings, swarm) as gateway, aiohttp.ClientSession(gateway.url) as http:
        async with http.get("/healthz", headers={"Host": "chat.example"}) as response:
            assert response.status == 200
        async with http.get("/healthz", headers={"Host": "evil.test"}) as response:
            assert response.status == 403


# ---------------------------------------------------------------- keys, and pages from elsewhere

ORIGIN = "https://chat.example"


@pytest.fixture
async def guarded(swarm: FakeSwarm, data_dir: Path) -> AsyncIterator[aiohttp.ClientSession]:
    settings = GatewaySettings(data_dir=data_dir, api_keys=("rose", "lily"), cors_origins=(ORIGIN,))
    async with Gateway(settings, swarm) as gateway, aiohttp.ClientSession(gateway.url) as http:
        yield http


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer ros"}, 401),
        ({"Authorization": "Basic rose"}, 401),
        ({"x-api-key": "\udcff"}, 401),
        ({"Authorization": "Bearer rose"}, 200),
        ({"x-api-key": "lily"}, 200),
    ],
)
async def test_with_keys_only_those_who_have_one_are_answered(
    guarded: aiohttp.ClientSession, swarm: FakeSwarm, headers: dict[str, str], status: int
) -> None:
    async with guarded.post(CHAT, json=chat(), headers=headers) as response:
        assert response.status == status
        if status == 401:
            assert (await response.json())["error"]["code"] == "invalid_api_key"
            assert response.headers["x-should-retry"] == "false"
    assert len(swarm.requests) == (status == 200)
    for path in ("/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize"):
        async with guarded.post(path, json={}, headers=headers) as response:
            assert (response.status == 401) == (status == 401), path
    for path in ("/", "/healthz", "/v1/models", "/v1/models/petal"):
        async with guarded.get(path, headers=headers) as response:
            assert response.status == 200


async def test_the_official_client_tells_a_wrong_key(guarded: aiohttp.ClientSession) -> None:
    base = str(guarded._base_url)
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="no", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="petal", messages=[{"role": "user", "content": "a"}])


async def test_a_page_that_was_named_may_use_the_api_and_no_other(guarded: aiohttp.ClientSession) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with guarded.options(CHAT, headers={"Origin": ORIGIN, **asked}) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert response.headers["Access-Control-Allow-Headers"] == "authorization"
    headers = {"Origin": ORIGIN, "Authorization": "Bearer rose"}
    for stream in (False, True):
        async with guarded.post(CHAT, json=chat(stream=stream), headers=headers) as response:
            assert response.status == 200
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]
    async with guarded.post(CHAT, json=chat(), headers={"Origin": ORIGIN}) as response:
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (401, ORIGIN)
    for origin in ("https://evil.test", "null"):
        async with guarded.options(CHAT, headers={"Origin": origin, **asked}) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers


# ---------------------------------------------------------------- what every response carries


async def test_the_page_may_run_its_own_scripts_only(swarm: FakeSwarm, static: Path) -> None:
    async with (
        Gateway(GatewaySettings(static=static), swarm) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
        http.get("/") as response,
    ):
        assert (await response.text()).startswith("<!doctype html>")
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
    hashed = base64.b64encode(hashlib.sha256(b'{"imports": {}}').digest()).decode()
    assert policy == (
        f"default-src 'none'; script-src 'self' 'sha256-{hashed}'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; font-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
    )


def test_a_page_without_an_import_map_runs_nothing_inline() -> None:
    assert "script-src 'self';" in content_security_policy(b"<script>alert(1)</script>")


async def test_errors_and_answers_carry_the_same_protection(http: aiohttp.ClientSession) -> None:
    for path in ("/healthz", "/nowhere", "/v1/models/elm", "/api/swarm"):
        async with http.get(path) as response:
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("vendor/preact.mjs", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("petal.svg", "image/svg+xml; charset=utf-8"),
        ("notes.txt", "text/plain"),
    ],
)
async def test_files_have_their_types(swarm: FakeSwarm, static: Path, path: str, kind: str) -> None:
    async with (
        Gateway(GatewaySettings(static=static), swarm) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
        http.get(f"/static/{path}") as response,
    ):
        assert (response.status, response.headers["Content-Type"]) == (200, kind)
        assert response.headers["Cache-Control"] == "no-cache"


async def test_folders_are_not_listed_and_not_left(swarm: FakeSwarm, static: Path) -> None:
    async with Gateway(GatewaySettings(static=static), swarm) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        for path in (
            "/static/",
            "/static/vendor",
            "/static/../conftest.py",
            "/static/%2e%2e/%2e%2e/etc/passwd",
        ):
            # A socket of our own: clients would tidy up the path.
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            status = (await reader.read()).split(b" ", 2)[1]
            writer.close()
            assert status in (b"403", b"404"), path


async def test_unknown_addresses_are_told_as_an_error_object(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/embeddings") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "unknown_url")
    async with http.get(CHAT) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (405, "method_not_allowed")
        assert "POST" in error["message"]


async def test_it_is_healthy(http: aiohttp.ClientSession) -> None:
    async with http.get("/healthz") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})


# ---------------------------------------------------------------- opening and closing


async def test_a_port_that_is_taken_is_told_in_one_sentence(gateway: Gateway, swarm: FakeSwarm) -> None:
    port = int(gateway.url.rpartition(":")[2])
    with pytest.raises(
        SettingsError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose"
    ):
        async with Gateway(GatewaySettings(port=port), swarm):
            pass


async def test_closing_ends_running_answers_and_watchers(swarm: FakeSwarm) -> None:
    swarm.script(Say("one"), Pause(asyncio.Event()))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as http:
        async with Gateway(GatewaySettings(), swarm) as gateway:
            answer = await http.post(f"{gateway.url}{CHAT}", json=chat(stream=True))
            await answer.content.readuntil(b"\n\n")
            watching = await http.get(f"{gateway.url}/api/swarm/events")
            await watching.content.readuntil(b"\n\n")
        assert swarm.running == 0
        assert await watching.content.read() == b""
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.content.read()
