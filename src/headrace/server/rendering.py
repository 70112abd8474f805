"""From the engine's outputs to OpenAI's completions and chat answers, whole or as a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from msgspec import UNSET

from headrace.contracts.outputs import CompletionOutput, Logprob, RequestOutput
from headrace.contracts.sampling import SamplingParams
from headrace.server.generation import Generation
from headrace.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Envelope,
    Message,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
    event,
)

if TYPE_CHECKING:
    from headrace.text.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

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


class Renderer(ABC):
    """Shows one request's outputs in one of OpenAI's formats.

    Args:
        request_id: without its prefix.
        model: the name under which the client knows it.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self, tokenizer: Tokenizer, request_id: str, model: str, params: SamplingParams
    ) -> None:
        self._tokenizer = tokenizer
        self._id = self.id_prefix + request_id
        self._model = model
        self._params = params
        self._created = int(time.time())

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Envelope:
        """The response to a request that does not stream."""

    @abstractmethod
    def part(
        self, prompt: int, output: RequestOutput, completion: CompletionOutput, sent: Progress
    ) -> CompletionChoice | ChatChunkChoice:
        """What came since ``sent``, which is brought up to date."""

    async def events(
        self, generation: Generation, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a stream; those of one step come together."""
        chunk = self._envelope(self.chunk_object)
        chunk.usage = None if include_usage else UNSET
        progress: dict[int, Progress] = {}
        async with aclosing(generation.changes()) as changes:
            async for outputs in changes:
                parts = self._new_parts(outputs, progress)
                if parts:
                    yield b"".join([_event(chunk, part) for part in parts])
        if include_usage:
            chunk.choices = []
            chunk.usage = generation.usage()
            yield event(chunk)
        yield b"data: [DONE]\n\n"

    def _new_parts(
        self, outputs: Mapping[int, RequestOutput], progress: dict[int, Progress]
    ) -> list[CompletionChoice | ChatChunkChoice]:
        parts = []
        for prompt, output in outputs.items():
            for completion in output.outputs:
                sent = progress.setdefault(self._index(prompt, completion), Progress())
                if self._is_news(completion, sent) and self._may_start(output):
                    parts.append(self.part(prompt, output, completion, sent))
        return parts

    def _is_news(self, completion: CompletionOutput, sent: Progress) -> bool:
        if sent.finished:
            return False
        more_tokens = len(completion.token_ids) > sent.tokens
        wants_tokens = not sent.started or self._params.logprobs is not None
        return (
            completion.finish_reason is not None
            or len(completion.text) > sent.text
            or (more_tokens and wants_tokens)
        )

    def _may_start(self, output: RequestOutput) -> bool:
        """Whether everything is known that belongs before the first token."""
        return True

    def _envelope(self, kind: str) -> Envelope:
        return Envelope(self._id, kind, self._created, self._model, [])

    def _index(self, prompt: int, completion: CompletionOutput) -> int:
        return prompt * self._params.n + completion.index

    def _token_text(self, token_id: int, entry: Logprob) -> str:
        return entry.decoded_token or self._tokenizer.token_text(token_id)

    def _prompt_logprobs(self, output: RequestOutput) -> PromptLogprobs:
        return [
            None
            if entries is None
            else {
                i: {
                    "logprob": _finite(entry.logprob),
                    "rank": entry.rank,
                    "decoded_token": self._token_text(i, entry),
                }
                for i, entry in entries.items()
            }
            for entries in output.prompt_logprobs or ()
        ]


class CompletionRenderer(Renderer):
    """The format of ``/v1/completions``.

    Args:
        echo: the prompts' texts, to begin the completions with; ``None`` without echo.
        prompt_logprobs: whether to report them in vLLM's form.
    """

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        tokenizer: Tokenizer,
        request_id: str,
        model: str,
        params: SamplingParams,
        *,
        echo: Sequence[str] | None,
        prompt_logprobs: bool,
    ) -> None:
        super().__init__(tokenizer, request_id, model, params)
        self._echo = echo
        self._reports_prompt = prompt_logprobs

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Envelope:
        choices = []
        for prompt, output in enumerate(outputs):
            for completion in output.outputs:
                choice = self.part(prompt, output, completion, Progress())
                if self._reports_prompt:
                    choice.prompt_logprobs = self._prompt_logprobs(output)
                choices.append(choice)
        response = self._envelope(self.whole_object)
        response.choices = choices
        response.usage = usage
        return response

    def part(
        self, prompt: int, output: RequestOutput, completion: CompletionOutput, sent: Progress
    ) -> CompletionChoice:
        echo = None if sent.started else self._echo
        text = completion.text[sent.text :]
        logprobs = None
        if self._params.logprobs is not None:
            logprobs = CompletionLogprobs()
            if echo is not None:
                self._add_logprobs(
                    logprobs, output.prompt_token_ids, output.prompt_logprobs or (), sent
                )
            new = slice(sent.tokens, None)
            self._add_logprobs(
                logprobs, completion.token_ids[new], (completion.logprobs or [])[new], sent
            )
        _advance(sent, completion)
        return CompletionChoice(
            self._index(prompt, completion),
            text if echo is None else echo[prompt] + text,
            logprobs,
            completion.finish_reason,
            completion.stop_reason,
        )

    def _may_start(self, output: RequestOutput) -> bool:
        wanted = self._echo is not None and self._params.logprobs is not None
        return not wanted or output.prompt_logprobs is not None

    def _add_logprobs(
        self,
        logprobs: CompletionLogprobs,
        token_ids: Sequence[int],
        entries: Sequence[Alternatives | None],
        sent: Progress,
    ) -> None:
        for token_id, alternatives in zip(token_ids, entries, strict=True):
            logprobs.text_offset.append(sent.offset)
            sent.offset += self._characters(token_id)
            if alternatives is None:  # the first token of a prompt follows nothing
                logprobs.tokens.append(self._tokenizer.token_text(token_id))
                logprobs.token_logprobs.append(None)
                logprobs.top_logprobs.append(None)
                continue
            own = alternatives[token_id]
            logprobs.tokens.append(self._token_text(token_id, own))
            logprobs.token_logprobs.append(_finite(own.logprob))
            logprobs.top_logprobs.append(self._by_text(alternatives))

    def _by_text(self, alternatives: Alternatives) -> dict[str, float]:
        """Of tokens that look alike, the likeliest stands for all."""
        found: dict[str, float] = {}
        for token_id, entry in sorted(alternatives.items(), key=lambda item: item[1].rank):
            found.setdefault(self._token_text(token_id, entry), _finite(entry.logprob))
        return found

    def _characters(self, token_id: int) -> int:
        """Characters that begin in this token's part of the text."""
        special = token_id in self._tokenizer.special_token_ids
        if special and self._params.skip_special_tokens:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token_id))


class ChatRenderer(Renderer):
    """The format of ``/v1/chat/completions``."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Envelope:
        (output,) = outputs
        response = self._envelope(self.whole_object)
        response.choices = [
            ChatChoice(
                completion.index,
                Message(completion.text),
                self._logprobs(completion, 0),
                completion.finish_reason,
                completion.stop_reason,
            )
            for completion in output.outputs
        ]
        response.usage = usage
        if self._params.prompt_logprobs is not None:
            response.prompt_logprobs = self._prompt_logprobs(output)
        return response

    def part(
        self, prompt: int, output: RequestOutput, completion: CompletionOutput, sent: Progress
    ) -> ChatChunkChoice:
        text = completion.text[sent.text :]
        delta = Delta(text if text or not sent.started else UNSET)
        if not sent.started:
            delta.role = "assistant"
        logprobs = self._logprobs(completion, sent.tokens)
        _advance(sent, completion)
        return ChatChunkChoice(
            completion.index, delta, logprobs, completion.finish_reason, completion.stop_reason
        )

    def _logprobs(self, completion: CompletionOutput, start: int) -> ChatLogprobs | None:
        if self._params.logprobs is None:
            return None
        ids = completion.token_ids[start:]
        entries = (completion.logprobs or [])[start:]
        return ChatLogprobs([self._token_logprob(i, e) for i, e in zip(ids, entries, strict=True)])

    def _token_logprob(self, token_id: int, alternatives: Alternatives) -> TokenLogprob:
        own = self._top_logprob(token_id, alternatives[token_id])
        wanted = self._params.logprobs or 0
        top = sorted(alternatives.items(), key=lambda item: item[1].rank)[:wanted]
        likeliest = [self._top_logprob(i, entry) for i, entry in top]
        return TokenLogprob(own.token, own.logprob, own.bytes, likeliest)

    def _top_logprob(self, token_id: int, entry: Logprob) -> TopLogprob:
        data = list(self._tokenizer.token_bytes(token_id))
        return TopLogprob(self._token_text(token_id, entry), _finite(entry.logprob), data)


def _event(chunk: Envelope, part: CompletionChoice | ChatChunkChoice) -> bytes:
    chunk.choices = [part]
    return event(chunk)


def _advance(sent: Progress, completion: CompletionOutput) -> None:
    sent.text = len(completion.text)
    sent.tokens = len(completion.token_ids)
    sent.started = True
    sent.finished = completion.finish_reason is not None


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
