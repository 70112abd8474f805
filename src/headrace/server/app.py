"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from headrace import __version__
from headrace.contracts.sampling import SamplingParams
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.server.access import ApiKeyMiddleware
from headrace.server.body import read_body
from headrace.server.errors import ApiError, install_handlers
from headrace.server.generation import Generation
from headrace.server.metrics import ServerMetrics
from headrace.server.rendering import ChatRenderer, CompletionRenderer, Renderer
from headrace.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    StrictModel,
    TokenizeRequest,
)
from headrace.server.responses import json_response
from headrace.server.streaming import EventStream, unless_disconnected

if TYPE_CHECKING:
    from headrace.llm import AsyncLLM

DEFAULT_MAX_BODY_BYTES = 16 * 2**20
_SCHEMAS = "#/components/schemas/{model}"
_BODIES: dict[str, type[StrictModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

Body = TypeVar("Body", CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)


def create_app(
    llm: AsyncLLM,
    *,
    api_key: str | None = None,
    model_names: Sequence[str],
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
) -> FastAPI:
    """An OpenAI-compatible application over ``llm``, which stays the caller's to close.

    Args:
        api_key: what clients must send; ``None`` serves everybody.
        model_names: the names under which the model is served, the first one being its own.
        max_body_bytes: longer request bodies are refused.

    Raises:
        ConfigurationError: the API key is empty.
    """
    if api_key is not None and not api_key.strip():
        raise ConfigurationError("api_key: is empty; give a key, or none to serve everybody")
    app = FastAPI(
        title="Headrace",
        version=__version__,
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    install_handlers(app)
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    endpoints = Endpoints(llm, model_names, max_body_bytes)
    for path, method, endpoint in (
        ("/v1/models", "GET", endpoints.models),
        ("/v1/models/{name:path}", "GET", endpoints.model),
        ("/v1/completions", "POST", endpoints.completions),
        ("/v1/chat/completions", "POST", endpoints.chat),
        ("/tokenize", "POST", endpoints.tokenize),
        ("/detokenize", "POST", endpoints.detokenize),
        ("/health", "GET", endpoints.health),
        ("/version", "GET", endpoints.version),
        ("/metrics", "GET", endpoints.metrics),
    ):
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_class=Response,
            response_model=None,
            openapi_extra=_describe_body(path),
        )
    _describe_schemas(app)
    return app


def _describe_body(path: str) -> dict[str, Any] | None:
    if path not in _BODIES:
        return None
    schema = {"$ref": _SCHEMAS.format(model=_BODIES[path].__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_schemas(app: FastAPI) -> None:
    """Bodies are read by ``read_body``, so FastAPI does not know their schemas by itself."""
    _, schemas = models_json_schema(
        [(body, "validation") for body in _BODIES.values()], ref_template=_SCHEMAS
    )
    components = app.openapi().setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas["$defs"])


class Endpoints:
    """One method per route."""

    def __init__(self, llm: AsyncLLM, model_names: Sequence[str], max_body_bytes: int) -> None:
        self._llm = llm
        self._names = tuple(model_names)
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())
        self._metrics = ServerMetrics(llm.stats)

    async def models(self) -> Response:
        """List the names under which the model is served."""
        return json_response({"object": "list", "data": [self._card(n) for n in self._names]})

    async def model(self, name: str) -> Response:
        """Describe a model."""
        return json_response(self._card(self._served(name)))

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        body = await self._read(request, CompletionRequest)
        body.check()
        params = self._llm.default_sampling_params(**body.sampling_fields())
        prompts = await asyncio.to_thread(self._encode, body.prompt, params)
        request_id = uuid.uuid4().hex
        renderer = CompletionRenderer(
            self._llm.tokenizer,
            request_id,
            self._served(body.model),
            params,
            echo=self._texts(body.prompt, params) if body.echo else None,
            prompt_logprobs=body.prompt_logprobs is not None,
        )
        return await self._answer(request, body, prompts, params, renderer, request_id)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        body = await self._read(request, ChatRequest)
        body.check()
        try:
            params = self._llm.default_sampling_params(**body.sampling_fields())
            prompt = await asyncio.to_thread(self._encode_chat, body, params)
            request_id = uuid.uuid4().hex
            renderer = ChatRenderer(
                self._llm.tokenizer, request_id, self._served(body.model), params
            )
            return await self._answer(request, body, [prompt], params, renderer, request_id)
        except InvalidRequestError as error:
            raise InvalidRequestError(body.field_name(error.field), error.message) from None

    async def tokenize(self, request: Request) -> Response:
        """Turn a prompt or a conversation into token ids."""
        body = await self._read(request, TokenizeRequest)
        body.check()
        ids = await asyncio.to_thread(self._tokenize, body)
        texts = [self._llm.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
        return json_response(
            {
                "count": len(ids),
                "max_model_len": self._llm.model_info.max_model_len,
                "tokens": ids,
                "token_strs": texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        body = await self._read(request, DetokenizeRequest)
        text = await asyncio.to_thread(self._llm.tokenizer.decode, body.tokens, False)
        return json_response({"prompt": text})

    async def health(self) -> Response:
        """Say that the server answers."""
        return json_response({"status": "ok"})

    async def version(self) -> Response:
        """Name the version of Headrace."""
        return json_response({"version": __version__})

    async def metrics(self) -> Response:
        """Report metrics for Prometheus."""
        return Response(self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        renderer: Renderer,
        request_id: str,
    ) -> Response:
        generation = Generation(
            self._llm, self._metrics, request_id, prompts, params, body.priority
        )
        if body.stream:
            return EventStream(renderer.events(generation, body.include_usage))
        outputs = await unless_disconnected(request.receive, generation.results())
        return json_response(renderer.whole(outputs, generation.usage()))

    async def _read(self, request: Request, model: type[Body]) -> Body:
        body = await read_body(request, model, self._max_body_bytes)
        self._served(body.model)
        return body

    def _served(self, name: str | None) -> str:
        if name is None:
            return self._names[0]
        if name not in self._names:
            served = ", ".join(self._names)
            raise ApiError(
                404,
                f"the model {name!r:.100} is not served here; served: {served}",
                param="model",
                code="model_not_found",
            )
        return name

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "headrace",
            "root": self._llm.model_info.name,
            "max_model_len": self._llm.model_info.max_model_len,
        }

    def _encode(
        self, prompts: Sequence[str | list[int]], params: SamplingParams
    ) -> list[list[int]]:
        room = self._llm.config.max_num_waiting
        if len(prompts) > room:
            raise InvalidRequestError(
                "prompt",
                f"{len(prompts)} prompts are more than the queue holds; send {room} at once",
            )
        return [self._llm.check(prompt, params) for prompt in prompts]

    def _encode_chat(self, body: ChatRequest, params: SamplingParams) -> list[int]:
        ids = self._chat_ids(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        return self._llm.check(ids, params)

    def _chat_ids(
        self, messages: Sequence[Message], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> list[int]:
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in variables:
                raise InvalidRequestError(
                    "chat_template_kwargs", f"cannot hold {name}, a field of the request itself"
                )
        tokenizer = self._llm.tokenizer
        text = tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return tokenizer.encode(text, add_special_tokens=False)

    def _tokenize(self, body: TokenizeRequest) -> list[int]:
        if body.messages is not None:
            return self._chat_ids(
                body.messages, body.add_generation_prompt, body.chat_template_kwargs
            )
        return self._llm.tokenizer.encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )

    def _texts(self, prompts: Sequence[str | list[int]], params: SamplingParams) -> list[str]:
        return [
            prompt
            if isinstance(prompt, str)
            else self._llm.tokenizer.decode(prompt, params.skip_special_tokens)
            for prompt in prompts
        ]
