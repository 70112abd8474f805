"""Reading a request's body: bounded while it arrives, JSON, of a known model."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from headrace.server.errors import ApiError
from headrace.server.requests import Model, validate


async def read_body(request: Request, model: type[Model], limit: int) -> Model:
    """The body of ``request`` as ``model``.

    Args:
        limit: bytes; a longer body is refused as soon as that is known.

    Raises:
        ApiError: 400 (not JSON, not UTF-8), 413 (too long) or 415 (another content type).
        InvalidRequestError: a field is wrong.
    """
    _check_content_type(request)
    return validate(model, _decode(await _read(request, limit)))


def _check_content_type(request: Request) -> None:
    # A web page of any origin may post text/plain without asking; JSON it may not.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "send the body as JSON, with Content-Type: application/json")


async def _read(request: Request, limit: int) -> bytearray:
    too_large = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return body


def _decode(body: bytearray) -> Any:
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8: {error.reason}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
