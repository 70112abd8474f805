"""A loaded model at the command line: answers one request at a time, streaming."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headrace.contracts.outputs import RequestOutput
from headrace.errors import ConfigurationError

if TYPE_CHECKING:
    from headrace.llm import AsyncLLM

Emit = Callable[[str], None]

MAX_TOKENS = 256
"""Length of an answer when none is asked for; less where the context ends."""


class Session:
    """Runs requests of a loaded model to their end. A context manager.

    Args:
        llm: closed when the session ends.
        sampling: fields of SamplingParams; the model's own defaults fill the rest.
    """

    def __init__(self, llm: AsyncLLM, sampling: dict[str, Any]) -> None:
        self.llm = llm
        self._sampling = sampling
        self._runner = asyncio.Runner()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.close()
        self.llm.close()

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can talk."""
        return self.llm.tokenizer.has_chat_template

    def complete(self, prompt: str, emit: Emit) -> RequestOutput:
        """Continue ``prompt``, handing each new piece of text to ``emit``.

        Raises:
            KeyboardInterrupt: Ctrl-C; the request is aborted and the session stays usable.
            HeadraceError: the request is wrong or failed.
        """
        return self._generate(self.llm.tokenizer.encode(prompt), emit)

    def reply(self, messages: list[dict[str, Any]], emit: Emit) -> RequestOutput:
        """Answer a conversation; otherwise as ``complete``."""
        if not self.has_chat_template:
            raise ConfigurationError("this model has no chat template; leave out --chat")
        text = self.llm.tokenizer.apply_chat_template(messages)
        return self._generate(self.llm.tokenizer.encode(text, add_special_tokens=False), emit)

    def _generate(self, token_ids: list[int], emit: Emit) -> RequestOutput:
        room = self.llm.model_info.max_model_len - len(token_ids)
        length = {"max_tokens": max(1, min(MAX_TOKENS, room))}
        params = self.llm.default_sampling_params(**{**length, **self._sampling})
        return self._runner.run(self._stream(token_ids, params, emit))

    async def _stream(self, token_ids: list[int], params: Any, emit: Emit) -> RequestOutput:
        sent = 0
        async with contextlib.aclosing(self.llm.generate(token_ids, params)) as outputs:
            async for output in outputs:
                text = output.outputs[0].text
                if len(text) > sent:
                    emit(text[sent:])
                    sent = len(text)
        return output
