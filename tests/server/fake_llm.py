"""An ``AsyncLLM`` without a model, whose answers and failures a test chooses.

One token is one byte. A prompt is echoed in capitals, one token at a time. What a prompt asks for
in its first word happens: see ``FakeLLM``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from headrace.config import EngineConfig
from headrace.contracts.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.stats import EngineStats
from headrace.errors import (
    EngineClosedError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
)

END = 256


class FakeTokenizer:
    """Bytes, and one special token."""

    vocab_size = 257
    special_token_ids = frozenset({END})
    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in token_ids if i != END or not skip_special_tokens]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<end>" if token_id == END else bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **_: Any
    ) -> list[int]:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return self.encode(text + "assistant:" if add_generation_prompt else text)


@dataclass
class FakeLLM:
    """Prompts that begin with

    - "overloaded" find the queue full, "closed" find the engine closed,
    - "fail" produce two tokens and then fail, "crash" do so with an error that nobody foresaw,
    - "endless" go on until they are aborted,
    - anything else is answered by itself in capitals.
    """

    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    running: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)
    seen: list[tuple[str, SamplingParams, int]] = field(default_factory=list)
    closed: bool = False
    draining: bool = False
    is_running: bool = True
    config: EngineConfig = field(default_factory=lambda: EngineConfig(max_num_waiting=32))
    adapters: Any = field(default_factory=lambda: SimpleNamespace(directories={}))
    model_info: Any = field(
        default_factory=lambda: SimpleNamespace(name="fake", max_model_len=4096)
    )

    def check(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InvalidRequestError("prompt", "is empty; give at least one token")
        if len(ids) > self.model_info.max_model_len:
            raise InvalidRequestError("prompt", f"has {len(ids)} tokens, more than the context")
        if params.max_tokens is not None and params.max_tokens > self.model_info.max_model_len:
            raise InvalidRequestError("max_tokens", "is more than the context holds")
        return ids

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0.25, **overrides})

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running),
            pages_total=99,
            preemptions=7,
            drafts=3,
            draft_tokens=12,
            accepted_tokens=5,
        )

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        adapter: str | None = None,
        methods: Any = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        text = self.tokenizer.decode(prompt)
        self.seen.append((request_id, params, priority))
        if text.startswith("overloaded"):
            raise OverloadedError("the queue is full", retry_after=2.5)
        if text.startswith("closed") or self.draining:
            raise EngineClosedError("the engine is shutting down")
        self.running.add(request_id)
        output = _new_output(request_id, prompt, params)
        try:
            async for token in self._tokens(text, params):
                for completion in output.outputs:
                    _add(completion, token, params)
                yield output
            _finish(output)
            yield output
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request_id)
            raise
        finally:
            self.running.discard(request_id)

    async def _tokens(self, text: str, params: SamplingParams) -> AsyncGenerator[int, None]:
        answer = text.upper().encode()
        limit = len(answer) if params.max_tokens is None else min(params.max_tokens, len(answer))
        count = 0
        while text.startswith("endless") or count < limit:
            await asyncio.sleep(0.001)
            if self.closed:
                raise EngineClosedError("the engine was closed")
            if count == 2 and text.startswith("fail"):
                raise GenerationError("the logits became NaN")
            if count == 2 and text.startswith("crash"):
                raise ZeroDivisionError("a secret detail")
            yield answer[count % len(answer)]
            count += 1

    async def drain(self, timeout: float) -> None:
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.running:
                    await asyncio.sleep(0.001)

    def close(self) -> None:
        self.closed = True


def _new_output(request_id: str, prompt: list[int], params: SamplingParams) -> RequestOutput:
    wants = params.logprobs is not None
    outputs = [CompletionOutput(i, logprobs=[] if wants else None) for i in range(params.n)]
    metrics = RequestMetrics(0.0, 0.1, 0.25, None, num_cached_tokens=1)
    output = RequestOutput(request_id, None, prompt, outputs, metrics=metrics)
    if params.prompt_logprobs is not None:
        output.prompt_logprobs = [None, *(_entries(i, params.prompt_logprobs) for i in prompt[1:])]
    return output


def _entries(token: int, top: int) -> dict[int, Logprob]:
    """The token itself is third; "a", "b", ... come before it and after it."""
    others = [i for i in range(97, 123) if i != token]
    ranks = {token: 3} | {i: rank + (rank > 2) for rank, i in enumerate(others, start=1)}
    return {i: Logprob(-float(r), r, None) for i, r in ranks.items() if i == token or r <= top}


def _add(completion: CompletionOutput, token: int, params: SamplingParams) -> None:
    completion.token_ids.append(token)
    completion.text = bytes(completion.token_ids).decode("utf-8", "ignore")
    if params.logprobs is not None and completion.logprobs is not None:
        completion.logprobs.append(_entries(token, params.logprobs))


def _finish(output: RequestOutput) -> None:
    assert output.metrics is not None
    output.metrics.finished_time = 1.25
    output.finished = True
    for completion in output.outputs:
        completion.finish_reason = "length"
