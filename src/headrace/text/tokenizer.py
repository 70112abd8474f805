"""A checkpoint's tokenizer: text to token ids and back, chat templates, streams of text."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.contracts.sampling import SamplingParams
from headrace.contracts.text import TextStream
from headrace.errors import InvalidRequestError
from headrace.text.detokenizer import (
    ByteDecoder,
    Detokenizer,
    TokenDecoder,
    WindowDecoder,
    piece_bytes,
)
from headrace.text.stop_strings import StopStrings
from headrace.text.vocabularies.directory import read_directory
from headrace.text.vocabularies.gguf import read_gguf
from headrace.text.vocabularies.vocabulary import Vocabulary


class Tokenizer:
    """The tokenizer in a Hugging Face directory. Safe to share between threads.

    Attributes:
        vocab_size: one more than the greatest token id.
        bos_token_id, eos_token_id: ``None`` when the checkpoint names none.
        special_token_ids: tokens that ``skip_special_tokens`` leaves out.
        has_chat_template: whether conversations can be turned into prompts.
        longest_token: characters that one token stands for at most, unknown ones set aside.

    Raises:
        CheckpointError: a file is missing or damaged; it names the file and the fix.
    """

    def __init__(self, directory: Path) -> None:
        self._use(read_directory(directory))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], origin: str = "the GGUF file") -> Tokenizer:
        """The tokenizer that the metadata of a GGUF file describe.

        Args:
            metadata: all of the file's, by key; lists may be any iterables.
            origin: the file, for error messages.

        Raises:
            CheckpointError: an entry is missing, damaged or of an unknown kind; it names the key.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._use(read_gguf(metadata, origin))
        return tokenizer

    def _use(self, vocabulary: Vocabulary) -> None:
        """Take what a checkpoint says, wherever it was read."""
        self._tokenizer = vocabulary.tokenizer
        self._names = vocabulary.names
        self._templates = vocabulary.templates
        self.bos_token_id = vocabulary.bos_token_id
        self.eos_token_id = vocabulary.eos_token_id
        self.has_chat_template = bool(self._templates)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_names = {i: token.content for i, token in added.items() if token.special}
        self.special_token_ids = frozenset(self._special_names)
        known = self._tokenizer.get_vocab()
        self.vocab_size = 1 + max(known.values(), default=-1)
        self.longest_token = max(map(len, known), default=0)
        decoder = self._tokenizer.decoder
        self._piece_bytes = piece_bytes(decoder and json.loads(decoder.__getstate__()))
        self._bytes = functools.cache(self._compute_bytes)
        # A request's completions share what is prepared for its stop strings.
        self._stop_strings = functools.lru_cache(maxsize=4)(StopStrings)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Names of special tokens in it become those tokens.

        Args:
            add_special_tokens: add what the tokenizer puts around a text (such as BOS).

        Raises:
            InvalidRequestError: of ``prompt``, when it is not text.
        """
        try:
            # Of the package's ways to encode, this one lets other threads run meanwhile.
            [encoding] = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            raise InvalidRequestError(
                "prompt", "must be a string of valid Unicode, without lone surrogates"
            ) from error
        return encoding.ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids beyond the vocabulary have none.

        Raises:
            InvalidRequestError: of ``tokens``, when they are not token ids.
        """
        try:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise InvalidRequestError("tokens", f"must be a list of token ids: {error}") from error

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none beyond the vocabulary."""
        return self._bytes(token_id) if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """A token for display: special ones by name, parts of a character as U+FFFD."""
        name = self._special_names.get(token_id)
        return name or self.token_bytes(token_id).decode("utf-8", "replace") or f"<{token_id}>"

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: as in OpenAI's API.
            add_generation_prompt: end with the start of the assistant's turn.
            tools: JSON schemas of functions; ``None`` and an empty list are the same.
            kwargs: further variables of the template, such as ``enable_thinking``.

        Raises:
            InvalidRequestError: of ``messages``, when there is no template or it refuses them.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "messages", "this model has no chat template; send a prompt to completions instead"
            )
        if not messages:
            raise InvalidRequestError("messages", "must hold at least one message")
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise InvalidRequestError(
                "messages", f"this model has no default chat template, only {known}"
            )
        variables = {
            "documents": None,
            **self._names,
            **kwargs,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._templates[name].render(messages, variables)

    def encode_chat(self, messages: list[dict[str, Any]], /, **options: Any) -> list[int]:
        """Token ids of a conversation; arguments as for ``apply_chat_template``."""
        text = self.apply_chat_template(messages, **options)
        return self.encode(text, add_special_tokens=False)

    def stream(self, params: SamplingParams) -> TextStream | None:
        """A stream for the text of one sequence that continues a prompt; ``None`` if no text is
        wanted. Malformed bytes become U+FFFD without touching the characters around them.
        """
        if not params.detokenize:
            return None
        hidden = self.special_token_ids if params.skip_special_tokens else frozenset[int]()
        decoder: TokenDecoder
        if self._piece_bytes is not None:
            decoder = ByteDecoder(self._bytes, hidden)
        else:
            decode = functools.partial(self.decode, skip_special_tokens=False)
            decoder = WindowDecoder(decode, hidden)
        stops = self._stop_strings(params.stop_strings)
        return Detokenizer(decoder, stops, params.include_stop_str_in_output)

    def _compute_bytes(self, token_id: int) -> bytes:
        if self._piece_bytes is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._piece_bytes(piece)
