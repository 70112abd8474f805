"""A checkpoint's tokenizer: text to token ids and back, chat templates, streams of text."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from headrace.contracts.sampling import SamplingParams
from headrace.contracts.text import TextStream
from headrace.errors import CheckpointError, InvalidRequestError
from headrace.json_file import read_json
from headrace.text.chat_template import load_chat_templates
from headrace.text.detokenizer import (
    ByteDecoder,
    Detokenizer,
    TokenDecoder,
    WindowDecoder,
    piece_bytes,
)
from headrace.text.stop_strings import StopStrings

_NAMED_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_LEGACY_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


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
        self._tokenizer = _load(directory)
        settings = read_json(directory / "special_tokens_map.json", required=False)
        settings |= read_json(directory / "tokenizer_config.json", required=False)
        names = {name: _content(settings.get(name)) for name in _NAMED_TOKENS}
        self._names = {name: text for name, text in names.items() if text is not None}
        _add_named_tokens(self._tokenizer, self._names, settings)
        self._templates = load_chat_templates(directory, settings.get("chat_template"))
        self.has_chat_template = bool(self._templates)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_names = {i: token.content for i, token in added.items() if token.special}
        self.special_token_ids = frozenset(self._special_names)
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.longest_token = max(map(len, vocabulary), default=0)
        model = read_json(directory / "config.json", required=False)
        self.bos_token_id = self._named_id("bos_token", model)
        self.eos_token_id = self._named_id("eos_token", model)
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

    def _named_id(self, name: str, model: Mapping[str, Any]) -> int | None:
        """The id of a named token, from the model's settings if the tokenizer's lack it."""
        if name in self._names:
            return self._tokenizer.token_to_id(self._names[name])
        value = model.get(f"{name}_id")
        first = value[0] if isinstance(value, list) and value else value
        return first if isinstance(first, int) else None

    def _compute_bytes(self, token_id: int) -> bytes:
        if self._piece_bytes is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._piece_bytes(piece)


def _load(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        legacy = [name for name in _LEGACY_FILES if (directory / name).is_file()]
        fix = "copy it from where the model came from"
        if legacy:
            fix = (
                f"convert {legacy[0]} once with transformers: AutoTokenizer.from_pretrained"
                f"({str(directory)!r}).save_pretrained({str(directory)!r})"
            )
        raise CheckpointError(f"{file} does not exist; {fix}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises nothing narrower, and its panics this
        raise CheckpointError(f"{file} is damaged ({error}); download it again") from error
    # The file may hold settings of the training run; a prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _content(token: object) -> str | None:
    """The text of a token, which stands in settings as a string or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_named_tokens(
    tokenizer: tokenizers.Tokenizer, names: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """Make special what the settings name, as far as the vocabulary has it."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    candidates = list(names.values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(key), list):
            candidates += filter(None, map(_content, settings[key]))
    tokenizer.add_special_tokens(
        [c for c in candidates if c not in known and tokenizer.token_to_id(c) is not None]
    )
