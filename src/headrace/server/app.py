"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from headrace import __version__
from headrace.contracts.sampling import SamplingParams
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.server.generation import Changes, collect, merge
from headrace.server.http import (
    ApiError,
    ApiKeyMiddleware,
    EventStream,
    install_handlers,
    json_response,
    read_json_body,
    unless_disconnected,
)
from headrace.server.metrics import ServerMetrics
from headrace.server.rendering import ChatRenderer, CompletionRenderer, Renderer
from headrace.server.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    Conversation,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
    validate,
)

if TYPE_CHECKING:
    from headrace.llm import AsyncLLM

DEFAULT_MAX_BODY_BYTES = 16 * 2**20


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
    app = FastAPI(title="Headrace", version=__version__, openapi_url=None, redirect_slashes=False)
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
        ("/metrics", "GET", endpoints.metrics),
    ):
        app.add_api_route(path, endpoint, methods=[method])
    return app


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
        params = self._llm.default_sampling_params(**body.sampling_fields())
        prompts = await asyncio.to_thread(self._encode, body.prompt, params)
        tokenizer, skip = self._llm.tokenizer, params.skip_special_tokens
        echo = None
        if body.echo:
            echo = [p if isinstance(p, str) else tokenizer.decode(p, skip) for p in body.prompt]
        renderer = CompletionRenderer(
            tokenizer,
            uuid.uuid4().hex,
            self._served(body.model),
            params,
            echo=echo,
            prompt_logprobs=body.prompt_logprobs is not None,
        )
        return await self._answer(request, body, prompts, renderer)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        body = await self._read(request, ChatRequest)
        try:
            params = self._llm.default_sampling_params(**body.sampling_fields())
            ids = await asyncio.to_thread(self._encode_chat, body, body.messages)
            self._llm.check(ids, params)
            model = self._served(body.model)
            renderer = ChatRenderer(self._llm.tokenizer, uuid.uuid4().hex, model, params)
            return await self._answer(request, body, [ids], renderer)
        except InvalidRequestError as error:
            raise InvalidRequestError(body.field_name(error.field), error.message) from None

    async def tokenize(self, request: Request) -> Response:
        """Turn a prompt or a conversation into token ids."""
        body = await self._read(request, TokenizeRequest)
        tokenizer = self._llm.tokenizer
        if body.messages is not None:
            ids = await asyncio.to_thread(self._encode_chat, body, body.messages)
        else:
            text = body.prompt or ""
            ids = await asyncio.to_thread(tokenizer.encode, text, body.add_special_tokens)
        limit = self._llm.model_info.max_model_len
        return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        body = await self._read(request, DetokenizeRequest)
        text = await asyncio.to_thread(self._llm.tokenizer.decode, body.tokens, False)
        return json_response({"prompt": text})

    async def health(self) -> Response:
        """Say whether requests can be served."""
        if not self._llm.is_running:
            raise ApiError(503, "the engine has stopped; restart the server", code="engine_stopped")
        return json_response({"status": "ok"})

    async def metrics(self) -> Response:
        """Report metrics for Prometheus."""
        return Response(self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _read(self, request: Request, model: type[Body]) -> Body:
        body = validate(model, await read_json_body(request, self._max_body_bytes))
        body.check()
        self._served(body.model)
        return body

    async def _answer(
        self, request: Request, body: GenerationRequest, prompts: list[list[int]], form: Renderer
    ) -> Response:
        changes = self._generate(prompts, form, body.priority)
        if body.stream:
            options = body.stream_options
            include_usage = options is not None and options.include_usage
            return EventStream(form.events(changes, include_usage))
        outputs = await unless_disconnected(request.receive, collect(changes))
        return json_response(form.whole(outputs))

    async def _generate(
        self, prompts: list[list[int]], form: Renderer, priority: int
    ) -> AsyncGenerator[Changes, None]:
        """Run all prompts; the first failure ends all, and so does closing this early."""
        streams = [
            self._llm.generate(prompt, form.params, f"{form.request_id}-{i}", priority=priority)
            for i, prompt in enumerate(prompts)
        ]
        async with aclosing(merge(streams)) as merged:
            async for changes in merged:
                for output in changes.values():
                    if output.finished:
                        self._metrics.observe(output)
                yield changes

    def _served(self, name: str | None) -> str:
        """The model's name in answers to a request that calls it ``name``."""
        if name is None:
            return self._names[0]
        if name not in self._names:
            message = f"the model {name!r:.100} is not served here; served: "
            message += ", ".join(self._names)
            raise ApiError(404, message, param="model", code="model_not_found")
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

    def _encode_chat(self, options: Conversation, messages: Sequence[Message]) -> list[int]:
        variables = options.chat_template_kwargs
        for name in {"messages", "tools", "add_generation_prompt"} & variables.keys():
            raise InvalidRequestError(
                "chat_template_kwargs", f"cannot hold {name}, a field of the request itself"
            )
        return self._llm.tokenizer.encode_chat(
            [message.for_template() for message in messages],
            add_generation_prompt=options.add_generation_prompt,
            **variables,
        )
