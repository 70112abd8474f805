"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from headrace import __version__
from headrace.contracts.sampling import SamplingParams
from headrace.errors import CheckpointError, ConfigurationError, InvalidRequestError
from headrace.server.generation import Changes, collect, gather, merge
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
from headrace.server.rendering import (
    ChatRenderer,
    CompletionRenderer,
    Renderer,
    render_vectors,
)
from headrace.server.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    Conversation,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationRequest,
    LoadAdapterRequest,
    Message,
    TokenizeRequest,
    UnloadAdapterRequest,
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
    allow_adapter_updates: bool = False,
) -> FastAPI:
    """An OpenAI-compatible application over ``llm``, which stays the caller's to close.

    Args:
        api_key: what clients must send; ``None`` serves everybody.
        model_names: the names under which the model is served, the first one being its own.
        max_body_bytes: longer request bodies are refused.
        allow_adapter_updates: whether clients may load and unload adapters.

    Raises:
        ConfigurationError: the API key is empty, or an adapter is called as the model is.
    """
    if api_key is not None and not api_key.strip():
        raise ConfigurationError("api_key: is empty; give a key, or none to serve everybody")
    for name in model_names:
        if name in llm.adapters.directories:
            raise ConfigurationError(f"adapter: {name!r} is the model's name; choose another")
    app = FastAPI(title="Headrace", version=__version__, openapi_url=None, redirect_slashes=False)
    install_handlers(app)
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    endpoints = Endpoints(llm, model_names, max_body_bytes)
    updates = AdapterEndpoints(llm, model_names, max_body_bytes, allow_adapter_updates)
    for path, method, endpoint in (
        ("/v1/models", "GET", endpoints.models),
        ("/v1/models/{name:path}", "GET", endpoints.model),
        ("/v1/completions", "POST", endpoints.completions),
        ("/v1/chat/completions", "POST", endpoints.chat),
        ("/v1/embeddings", "POST", endpoints.embeddings),
        ("/v1/load_lora_adapter", "POST", updates.load),
        ("/v1/unload_lora_adapter", "POST", updates.unload),
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
        cards = [self._card(name) for name in self._names]
        for name, directory in self._llm.adapters.directories.items():
            cards.append(self._adapter_card(name, directory))
        return json_response({"object": "list", "data": cards})

    async def model(self, name: str) -> Response:
        """Describe a model."""
        directory = self._llm.adapters.directories.get(name)
        if directory is not None:
            return json_response(self._adapter_card(name, directory))
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

    async def embeddings(self, request: Request) -> Response:
        """Embed texts."""
        body = await self._read(request, EmbeddingRequest)
        model = self._served(body.model)
        self._check_room("input", len(body.input))
        try:
            texts = await asyncio.to_thread(lambda: [self._llm.check_text(t) for t in body.input])
        except InvalidRequestError as error:
            raise InvalidRequestError("input", error.message) from None
        stem = uuid.uuid4().hex
        jobs = [
            self._llm.embed(
                ids,
                f"{stem}-{i}",
                dimensions=body.dimensions,
                priority=body.priority,
                adapter=self._adapter(model),
                methods=body.methods,
            )
            for i, ids in enumerate(texts)
        ]
        outputs = await unless_disconnected(request.receive, gather(jobs))
        for output in outputs:
            self._metrics.observe(output)
        count = sum(map(len, texts))
        return json_response(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": vector}
                    for index, vector in enumerate(render_vectors(outputs, body.encoding_format))
                ],
                "model": model,
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )

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
        changes = self._generate(prompts, form, body)
        if body.stream:
            options = body.stream_options
            include_usage = options is not None and options.include_usage
            return EventStream(form.events(changes, include_usage))
        outputs = await unless_disconnected(request.receive, collect(changes))
        return json_response(form.whole(outputs))

    async def _generate(
        self, prompts: list[list[int]], form: Renderer, body: GenerationRequest
    ) -> AsyncGenerator[Changes, None]:
        """Run all prompts; the first failure ends all, and so does closing this early."""
        streams = [
            self._llm.generate(
                prompt,
                form.params,
                f"{form.request_id}-{i}",
                priority=body.priority,
                adapter=self._adapter(form.model),
                methods=body.methods,
            )
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
        known = (*self._names, *self._llm.adapters.directories)
        if name not in known:
            message = f"the model {name!r:.100} is not served here; served: "
            message += ", ".join(known)
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def _adapter(self, name: str) -> str | None:
        """The adapter that a served name stands for."""
        return None if name in self._names else name

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "headrace",
            "root": self._llm.model_info.name,
            "max_model_len": self._llm.model_info.max_model_len,
        }

    def _adapter_card(self, name: str, directory: Path) -> dict[str, Any]:
        return {**self._card(name), "root": str(directory), "parent": self._names[0]}

    def _encode(
        self, prompts: Sequence[str | list[int]], params: SamplingParams
    ) -> list[list[int]]:
        self._check_room("prompt", len(prompts))
        return [self._llm.check(prompt, params) for prompt in prompts]

    def _check_room(self, field: str, count: int) -> None:
        room = self._llm.config.max_num_waiting
        if count > room:
            raise InvalidRequestError(
                field, f"{count} prompts are more than the queue holds; send {room} at once"
            )

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


class AdapterEndpoints:
    """Adapters that come and go while the server runs; the routes are vLLM's."""

    def __init__(
        self, llm: AsyncLLM, model_names: Sequence[str], max_body_bytes: int, allowed: bool
    ) -> None:
        self._llm, self._model_names = llm, model_names
        self._max_body_bytes, self._allowed = max_body_bytes, allowed

    async def load(self, request: Request) -> Response:
        """Load an adapter from a directory of the server's machine, in place of its namesake."""
        body = await self._read(request, LoadAdapterRequest)
        if body.lora_name in self._model_names:
            raise InvalidRequestError("lora_name", "is the model's name; choose another")
        try:
            await self._llm.load_adapter(body.lora_name, body.lora_path)
        except CheckpointError as error:
            raise InvalidRequestError("lora_path", str(error)) from None
        except ConfigurationError as error:
            raise InvalidRequestError("lora_name", str(error)) from None
        return json_response({"message": f"{body.lora_name} is loaded"})

    async def unload(self, request: Request) -> Response:
        """Offer an adapter no longer."""
        body = await self._read(request, UnloadAdapterRequest)
        try:
            await self._llm.unload_adapter(body.lora_name)
        except InvalidRequestError as error:
            raise InvalidRequestError("lora_name", error.message) from None
        return json_response({"message": f"{body.lora_name} is unloaded"})

    async def _read(self, request: Request, model: type[Body]) -> Body:
        if not self._allowed:
            raise ApiError(
                403, "adapters are fixed here; start the server with --allow-adapter-updates"
            )
        return validate(model, await read_json_body(request, self._max_body_bytes))
