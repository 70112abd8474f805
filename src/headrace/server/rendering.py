"""From the engine's outputs to OpenAI's completions and chat answers, whole or as a stream."""

from __future__ import annotations

import base64
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from headrace.contracts.outputs import CompletionOutput, Logprob, RequestOutput
from headrace.contracts.sampling import SamplingParams
from headrace.server.generation import Changes
from headrace.server.http import event

if TYPE_CHECKING:
    from headrace.text.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

Json = dict[str, Any]
Alternatives = Mapping[int, Logprob]


@dataclass(slots=True)
class Progress:
    """How much of one completion has been sent: characters, tokens, and whether it is complete.

    ``offset`` is where the next token starts in the text, in characters.
    """

    text: int = 0
    tokens: int = 0
    offset: int = 0
    started: bool = False
    finished: bool = False


@dataclass(slots=True)
class Renderer(ABC):
    """Shows one request's outputs in one of OpenAI's formats.

    Args:
        request_id: without its prefix.
        model: the name under which the client knows it.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    tokenizer: Tokenizer
    request_id: str
    model: str
    params: SamplingParams
    created: int = field(default_factory=lambda: int(time.time()), kw_only=True)

    @abstractmethod
    def content(
        self, prompt: int, output: RequestOutput, completion: CompletionOutput, sent: Progress
    ) -> Json:
        """What a stream's choice says of the text and tokens that came since ``sent``."""

    def whole(self, outputs: Sequence[RequestOutput]) -> Json:
        """The response to a request that does not stream."""
        choices = [
            self._choice(prompt, output, completion, Progress())
            for prompt, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return self._envelope(self.whole_object) | {"choices": choices, "usage": _usage(outputs)}

    async def events(
        self, changes: AsyncGenerator[Changes, None], include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a stream; those of one step come together."""
        chunk = self._envelope(self.chunk_object)
        if include_usage:
            chunk["usage"] = None
        progress: dict[int, Progress] = {}
        outputs: Changes = {}
        async with aclosing(changes):
            async for changed in changes:
                outputs.update(changed)
                choices = self._new_choices(changed, progress)
                if choices:
                    yield b"".join([event(chunk | {"choices": [each]}) for each in choices])
        if include_usage:
            yield event(chunk | {"choices": [], "usage": _usage(outputs.values())})
        yield b"data: [DONE]\n\n"

    def _new_choices(self, changed: Changes, progress: dict[int, Progress]) -> list[Json]:
        choices = []
        for prompt, output in changed.items():
            if self.params.prompt_logprobs is not None and output.prompt_logprobs is None:
                continue  # an echo comes first, with its logprobs
            for completion in output.outputs:
                sent = progress.setdefault(self._index(prompt, completion), Progress())
                tokens_count = not sent.started or self.params.logprobs is not None
                has_news = (
                    completion.finish_reason is not None
                    or len(completion.text) > sent.text
                    or (tokens_count and len(completion.token_ids) > sent.tokens)
                )
                if has_news and not sent.finished:
                    choices.append(self._choice(prompt, output, completion, sent))
        return choices

    def _choice(
        self, prompt: int, output: RequestOutput, completion: CompletionOutput, sent: Progress
    ) -> Json:
        """What came since ``sent``, which is brought up to date."""
        content = self.content(prompt, output, completion, sent)
        sent.text = len(completion.text)
        sent.tokens = len(completion.token_ids)
        sent.started = True
        sent.finished = completion.finish_reason is not None
        return {
            "index": self._index(prompt, completion),
            **content,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def _envelope(self, kind: str) -> Json:
        return {
            "id": self.id_prefix + self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _index(self, prompt: int, completion: CompletionOutput) -> int:
        return prompt * self.params.n + completion.index

    def _prompt_logprobs(self, output: RequestOutput) -> list[dict[int, Json] | None]:
        """In vLLM's form."""

        def shown(token_id: int, entry: Logprob) -> Json:
            text = self.tokenizer.token_text(token_id)
            return {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": text}

        return [
            None if entries is None else {i: shown(i, entry) for i, entry in entries.items()}
            for entries in output.prompt_logprobs or ()
        ]


@dataclass(slots=True)
class CompletionRenderer(Renderer):
    """The format of ``/v1/completions``.

    Args:
        echo: the prompts' texts, to begin the completions with; ``None`` without echo.
        prompt_logprobs: whether a whole response reports them in vLLM's form.
    """

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    echo: Sequence[str] | None
    prompt_logprobs: bool

    def content(
        self, prompt: int, output: RequestOutput, completion: CompletionOutput, sent: Progress
    ) -> Json:
        echo = None if sent.started else self.echo
        text = completion.text[sent.text :]
        content: Json = {"text": text if echo is None else echo[prompt] + text, "logprobs": None}
        if self.params.logprobs is not None:
            entries: list[tuple[int, Alternatives | None]] = []
            if echo is not None:
                entries += zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
            new = slice(sent.tokens, None)
            entries += zip(completion.token_ids[new], (completion.logprobs or [])[new], strict=True)
            content["logprobs"] = self._logprobs(entries, sent)
        if self.prompt_logprobs:
            content["prompt_logprobs"] = self._prompt_logprobs(output)
        return content

    def _logprobs(
        self, entries: Sequence[tuple[int, Alternatives | None]], sent: Progress
    ) -> dict[str, list[Any]]:
        """Parallel lists, one entry per token; ``text_offset`` counts characters of the text."""
        shown: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, alternatives in entries:  # none for the first token: it follows nothing
            own = alternatives and _finite(alternatives[token_id].logprob)
            shown["tokens"].append(self.tokenizer.token_text(token_id))
            shown["token_logprobs"].append(own)
            shown["top_logprobs"].append(alternatives and self._by_text(alternatives))
            shown["text_offset"].append(sent.offset)
            sent.offset += self._characters(token_id)
        return shown

    def _by_text(self, alternatives: Alternatives) -> dict[str, float]:
        """Of tokens that look alike, the likeliest stands for all."""
        found: dict[str, float] = {}
        for token_id, entry in _ranked(alternatives):
            found.setdefault(self.tokenizer.token_text(token_id), _finite(entry.logprob))
        return found

    def _characters(self, token_id: int) -> int:
        """Characters that begin in this token's part of the text."""
        special = token_id in self.tokenizer.special_token_ids
        if special and self.params.skip_special_tokens:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.tokenizer.token_bytes(token_id))


@dataclass(slots=True)
class ChatRenderer(Renderer):
    """The format of ``/v1/chat/completions``."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, outputs: Sequence[RequestOutput]) -> Json:
        response = Renderer.whole(self, outputs)
        for choice in response["choices"]:
            choice["message"] = {**choice.pop("delta"), "refusal": None}
        if self.params.prompt_logprobs is not None:
            response["prompt_logprobs"] = self._prompt_logprobs(outputs[0])
        return response

    def content(
        self, prompt: int, output: RequestOutput, completion: CompletionOutput, sent: Progress
    ) -> Json:
        text = completion.text[sent.text :]
        delta = {"content": text} if text or not sent.started else {}
        if not sent.started:
            delta["role"] = "assistant"
        logprobs = None
        if self.params.logprobs is not None:
            ids = completion.token_ids[sent.tokens :]
            entries = (completion.logprobs or [])[sent.tokens :]
            tokens = [self._token_logprob(i, e) for i, e in zip(ids, entries, strict=True)]
            logprobs = {"content": tokens, "refusal": None}
        return {"delta": delta, "logprobs": logprobs}

    def _token_logprob(self, token_id: int, alternatives: Alternatives) -> Json:
        top = _ranked(alternatives)[: self.params.logprobs]
        return self._logprob(token_id, alternatives[token_id]) | {
            "top_logprobs": [self._logprob(i, entry) for i, entry in top]
        }

    def _logprob(self, token_id: int, entry: Logprob) -> Json:
        return {
            "token": self.tokenizer.token_text(token_id),
            "logprob": _finite(entry.logprob),
            "bytes": list(self.tokenizer.token_bytes(token_id)),
        }


def _usage(outputs: Collection[RequestOutput]) -> Json:
    """Tokens in and out, of all prompts."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    cached = sum(o.metrics.num_cached_tokens for o in outputs if o.metrics is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _ranked(alternatives: Alternatives) -> list[tuple[int, Logprob]]:
    return sorted(alternatives.items(), key=lambda item: item[1].rank)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def render_vectors(outputs: Sequence[RequestOutput], encoding: str) -> list[list[float] | str]:
    """Embeddings as lists of numbers, or as base64 of little-endian fp32."""
    vectors: list[list[float] | str] = []
    for output in outputs:
        assert output.embedding is not None
        raw = output.embedding.astype("<f4")
        if encoding == "base64":
            vectors.append(base64.b64encode(raw.tobytes()).decode())
        else:
            vectors.append(raw.tolist())
    return vectors
