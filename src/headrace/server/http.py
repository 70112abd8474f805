"""HTTP below the routes: errors in OpenAI's format, the API key, bodies, streams, clients that
go away.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.errors import (
    EngineClosedError,
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
)

T = TypeVar("T")

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_OPEN_PATHS = frozenset({"/health", "/metrics"})
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}
_DRAIN_RETRY_SECONDS = 5
_CLIENT_CLOSED_REQUEST = 499


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
        kind = _TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = headers

    def response(self) -> Response:
        """The error as an HTTP response."""
        body = _encode(self.body)
        return Response(body, self.status, self.headers, media_type="application/json")


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
    if isinstance(error, HeadraceError):
        return ApiError(500, str(error), code="generation_failed")
    if isinstance(error, ClientDisconnect):  # nobody is there to read it
        return ApiError(_CLIENT_CLOSED_REQUEST, "the client went away")
    # The server drops the connection after an error that reaches it.
    close = {"Connection": "close"}
    return ApiError(500, "internal error; the server's log has the details", headers=close)


def install_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's format."""

    async def answer(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def answer_router(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    for kind in (ApiError, ClientDisconnect, HeadraceError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_router)


class ApiKeyMiddleware:
    """Asks for ``Authorization: Bearer <key>`` everywhere but on ``_OPEN_PATHS``."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.strip().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS and not self._allows(scope):
            message = "wrong or missing API key; send it as Authorization: Bearer <key>"
            challenge = {"WWW-Authenticate": "Bearer"}
            app = ApiError(401, message, code="invalid_api_key", headers=challenge).response()
        await app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        same = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        return same and scheme.lower() == "bearer"


async def read_json_body(request: Request, limit: int) -> Any:
    """The JSON value in the body of ``request``.

    Args:
        limit: bytes; a longer body is refused as soon as that is known.

    Raises:
        ApiError: 400 (not JSON, not UTF-8), 413 (too long) or 415 (another content type).
    """
    # A web page of any origin may post text/plain without asking; JSON it may not.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "send the body as JSON, with Content-Type: application/json")
    too_large = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8: {error.reason}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None


def json_response(value: Any) -> Response:
    """``value`` as a JSON response."""
    return Response(_encode(value), media_type="application/json")


def event(value: Any) -> bytes:
    """``value`` as a server-sent event."""
    return b"data: %b\n\n" % _encode(value)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``, cancelling it at once when the client disconnects.

    The request's body must have been read.

    Raises:
        ClientDisconnect: the client went away first; ``work`` has ended by then.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends ``events`` (one at least, each with its empty line) as they come, and closes them.

    The response starts with the first event, so what fails earlier is answered with its own
    status. A later failure becomes the stream's last event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async def send_part(data: bytes, more_body: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more_body})

        async with aclosing(self._events) as events:
            first = await anext(events)
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            await send_part(first)
            try:
                async for part in events:
                    await send_part(part)
            except Exception as error:
                if not isinstance(error, HeadraceError):
                    _log.error("a request failed", exc_info=error)
                await send_part(event(api_error(error).body))
        await send_part(b"", more_body=False)
