"""What tests of the API say often: a body to send, and the events of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

Json = dict[str, Any]

CHAT = "/v1/chat/completions"


def chat(**fields: object) -> Json:
    """A request body; fields replace or add to the usual ones."""
    return {"model": "petal", "messages": [{"role": "user", "content": "Hello"}], **fields}


async def post(
    http: aiohttp.ClientSession, body: object, headers: Mapping[str, str] | None = None
) -> tuple[int, Json, Mapping[str, str]]:
    """Status, JSON and headers of an answer."""
    async with http.post(CHAT, json=body, headers=headers) as response:
        return response.status, await response.json(), response.headers


async def error_of(http: aiohttp.ClientSession, body: object) -> tuple[int, Json]:
    """Status and error object; a failure when the answer is none."""
    status, answer, _ = await post(http, body)
    assert answer.keys() == {"error"} and answer["error"].keys() == {"message", "type", "param", "code"}
    return status, answer["error"]


async def lines(http: aiohttp.ClientSession, body: object) -> list[str]:
    """A stream as it is on the wire, one entry per event or comment."""
    async with http.post(CHAT, json=body) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    assert text.endswith("\n\n")
    return text.removesuffix("\n\n").split("\n\n")


async def chunks(http: aiohttp.ClientSession, body: object) -> list[Json]:
    """The chunks of a stream that ended well."""
    *events, last = await lines(http, body)
    assert last == "data: [DONE]"
    return [orjson.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: ")]


def content(stream: list[Json]) -> str:
    """The text that a stream told."""
    return "".join(choice["delta"].get("content") or "" for chunk in stream for choice in chunk["choices"])
