"""Errors in OpenAI's format, and what each exception becomes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from headrace.errors import (
    EngineClosedError,
    GenerationError,
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
)

_log = logging.getLogger(__name__)
_DRAIN_RETRY_SECONDS = 5
CLIENT_CLOSED_REQUEST = 499
"""Status of a response that nobody is there to read."""


class ApiError(Exception):
    """A refusal with its HTTP status.

    Args:
        param: the request field that is wrong.
        code: OpenAI's short name of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """The JSON object ``{"error": {...}}``."""
        fields = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": fields})

    def response(self) -> Response:
        """The error as an HTTP response."""
        return Response(
            self.body(), self.status, dict(self.headers or {}), media_type="application/json"
        )


_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


def api_error(error: Exception) -> ApiError:
    """What a client is told about ``error``. Unforeseen errors do not show their message."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, OverloadedError):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, str(error), code="overloaded", headers=wait)
    if isinstance(error, EngineClosedError):
        wait = {"Retry-After": str(_DRAIN_RETRY_SECONDS)}
        return ApiError(503, str(error), code="shutting_down", headers=wait)
    if isinstance(error, GenerationError):
        return ApiError(500, str(error), code="generation_failed")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    # The server drops the connection after an error that reaches it.
    close = {"Connection": "close"}
    return ApiError(500, "internal error; the server's log has the details", headers=close)


def install_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's format."""

    async def answer(request: Request, error: Exception) -> Response:
        found = api_error(error)
        if isinstance(error, HTTPException) and found.status in (404, 405):
            found.message = f"{found.message}: {request.method} {request.url.path}"
        return found.response()

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for kind in (
        ApiError,
        EngineClosedError,
        Exception,
        GenerationError,
        HTTPException,
        InvalidRequestError,
        OverloadedError,
    ):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnect, gone)


def log_unforeseen(error: Exception) -> None:
    """Keep the trace of an error that is not one of ours."""
    if not isinstance(error, ApiError | HeadraceError):
        _log.error("a request failed", exc_info=error)
