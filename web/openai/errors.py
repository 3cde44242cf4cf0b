"""Errors as OpenAI clients expect them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from shared.errors import (
    Busy,
    ConnectionLost,
    CorollaError,
    NoRoom,
    NoRoute,
    ProtocolError,
    Refused,
    SessionFailed,
)
from web.tokenizer import ChatRefused

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""When to ask again while layers are missing: peers that restart are back after some seconds."""


class ApiError(CorollaError):
    """An error with everything that a client is told of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def as_json(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """OpenAI's clients repeat 429 and 5xx by themselves, so they are told when that is useless."""
        if self.retry_after_s is not None:
            return {
                "Retry-After": str(math.ceil(self.retry_after_s)),
                "retry-after-ms": str(math.ceil(self.retry_after_s * 1000)),
            }
        return {"x-should-retry": "false"}

    def response(self) -> web.Response:
        return web.json_response(
            body=orjson.dumps(self.as_json()), status=self.status, headers=self.headers()
        )


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"no peer here serves a model named {name[:200]!r}; GET /v1/models lists those that are served",
        code="model_not_found",
        param="model",
    )


def api_error(error: Exception) -> ApiError:
    """What a client is told of any error; what is a mistake of ours stays in our log."""
    match error:
        case ApiError():
            return error
        case ChatRefused():
            return bad_request(str(error), param="messages")
        case NoRoute():
            return _swarm_error(HTTPStatus.SERVICE_UNAVAILABLE, error, "no_route", RETRY_S)
        case NoRoom():
            return bad_request(str(error), code="context_length_exceeded", param="messages")
        case Busy():
            return ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                str(error),
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=error.retry_after_s,
            )
        case ConnectionLost():
            return _swarm_error(HTTPStatus.SERVICE_UNAVAILABLE, error, "connection_lost", RETRY_S)
        case SessionFailed():
            return _swarm_error(HTTPStatus.BAD_GATEWAY, error, "session_failed")
        case Refused():
            return _swarm_error(HTTPStatus.BAD_GATEWAY, error, "refused")
        case ProtocolError():
            return _swarm_error(HTTPStatus.BAD_GATEWAY, error, "protocol_error")
        case CorollaError():
            return _swarm_error(HTTPStatus.INTERNAL_SERVER_ERROR, error, "internal_error")
        case _:
            log.error("a request failed by a mistake of ours", exc_info=error)
            return ApiError(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "the gateway made a mistake; its log says which",
                kind="server_error",
                code="internal_error",
            )


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong before an answer began becomes an error object."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        return _http_error(request, error).response()
    except ConnectionError:
        raise  # the client left; there is nobody to tell
    except Exception as error:
        return api_error(error).response()


def _swarm_error(status: int, error: CorollaError, code: str, retry_after_s: float | None = None) -> ApiError:
    return ApiError(status, str(error), kind="server_error", code=code, retry_after_s=retry_after_s)


def _http_error(request: web.Request, error: web.HTTPException) -> ApiError:
    """aiohttp's own refusals, in our words."""
    where = f"{request.method} {request.path[:200]}"
    match error:
        case web.HTTPNotFound():
            return ApiError(HTTPStatus.NOT_FOUND, f"there is no {where} here", code="unknown_url")
        case web.HTTPMethodNotAllowed(allowed_methods=allowed):
            return ApiError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"there is no {where} here; this address takes {', '.join(sorted(allowed))}",
                code="method_not_allowed",
            )
        case web.HTTPRequestEntityTooLarge():
            return ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request is too large: at most {request.client_max_size // 2**20} MiB are taken",
                code="request_too_large",
            )
        case _:
            return ApiError(error.status, error.reason, code=f"http_{error.status}")
