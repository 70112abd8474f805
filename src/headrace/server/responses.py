"""What clients get: msgspec structures in OpenAI's shapes, encoded once per message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response

_encode = msgspec.json.Encoder().encode


class PromptTokensDetails(Struct):
    """How many prompt tokens came from the prefix cache."""

    cached_tokens: int


class Usage(Struct):
    """Tokens of one HTTP request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Struct):
    """Parallel lists, one entry per token; ``text_offset`` counts characters of the text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(Struct):
    """A completion, or what a stream adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TopLogprob(Struct):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Of a message's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class Message(Struct):
    """The assistant's answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Delta(Struct):
    """What a stream adds to the answer."""

    content: str | UnsetType = UNSET
    role: Literal["assistant"] | UnsetType = UNSET


class ChatChoice(Struct):
    """A whole answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class ChatChunkChoice(Struct):
    """A part of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


PromptLogprobs = list[dict[int, Any] | None]


class Envelope(Struct):
    """A whole response, or one chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[CompletionChoice | ChatChoice | ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


def json_response(value: Any) -> Response:
    """``value`` as a JSON response."""
    return Response(_encode(value), media_type="application/json")


def event(value: Any) -> bytes:
    """``value`` as a server-sent event."""
    return b"data: %b\n\n" % _encode(value)
