"""GET /openapi.json: what each address takes, made of the very types that read it."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import msgspec
import orjson
from aiohttp import web

from web.openai.messages import MessagesRequest
from web.openai.requests import ChatRequest, CompletionRequest
from web.openai.responses import ResponsesRequest
from web.openai.tokenizing import DetokenizeRequest, TokenizeRequest

Json = dict[str, Any]

BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": MessagesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
READS = ("/v1/models", "/v1/models/{id}", "/tokenizer_info", "/healthz", "/api/swarm", "/api/history")


def openapi() -> Json:
    """The whole description."""
    schemas, components = msgspec.json.schema_components(
        BODIES.values(), ref_template="#/components/schemas/{name}"
    )
    answers = {
        "200": {"description": "the answer, or a stream of it"},
        "default": {"description": "an error object"},
    }
    paths: Json = {
        path: {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": answers,
            }
        }
        for path, schema in zip(BODIES, schemas, strict=True)
    }
    for path in READS:
        names = re.findall(r"{(\w+)}", path)
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
        paths[path] = {"get": {"parameters": parameters, "responses": answers}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Corolla", "version": version("corolla")},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


async def get_openapi(request: web.Request) -> web.Response:
    return web.json_response(body=orjson.dumps(openapi()))
