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
from headrace.text.chat_template import load_chat_templates, read_json
from headrace.text.detokenizer import (
    ByteDecoder,
    Detokenizer,
    TokenBytes,
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

    Raises:
        CheckpointError: a file is missing or damaged; it names the file and the fix.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = _load(directory)
        settings = _load_settings(directory)
        names = {name: _content(settings.get(name)) for name in _NAMED_TOKENS}
        self._names = {name: text for name, text in names.items() if text is not None}
        _add_named_tokens(self._tokenizer, self._names, settings)
        self._templates = load_chat_templates(directory, settings.get("chat_template"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_names = {i: token.content for i, token in added.items() if token.special}
        self.special_token_ids = frozenset(self._special_names)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        model = _read_optional(directory / "config.json")
        self.bos_token_id = self._named_id("bos_token", model)
        self.eos_token_id = self._named_id("eos_token", model)
        self._piece_bytes = piece_bytes(_decoder_settings(self._tokenizer))
        self._bytes = TokenBytes(self._compute_bytes)
        self._visible_bytes = TokenBytes(self._compute_bytes, hidden=self.special_token_ids)
        # A request's completions share one automaton.
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
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """A token for display: special ones by name, parts of a character as U+FFFD."""
        name = self._special_names.get(token_id)
        return name or self.token_bytes(token_id).decode("utf-8", "replace") or f"<{token_id}>"

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be turned into prompts."""
        return bool(self._templates)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation; encode it with ``add_special_tokens=False``.

        Args:
            messages: as in OpenAI's API.
            add_generation_prompt: end with the start of the assistant's turn.
            tools: JSON schemas of functions; ``None`` and an empty list are the same.
            kwargs: further variables of the template, such as ``enable_thinking``.

        Raises:
            InvalidRequestError: of ``messages``, when there is no template or it refuses them.
        """
        if not self._templates:
            raise InvalidRequestError(
                "messages", "this model has no chat template; send a prompt to completions instead"
            )
        if not messages:
            raise InvalidRequestError("messages", "must hold at least one message")
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
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
        return template.render(messages, variables)

    def stream(self, params: SamplingParams) -> TextStream | None:
        """A stream for the text of one sequence that continues a prompt; ``None`` if no text is
        wanted. Malformed bytes become U+FFFD without touching the characters around them.
        """
        if not params.detokenize:
            return None
        stops = self._stop_strings(tuple(params.stop)) if params.stop else None
        decoder = self._token_decoder(params.skip_special_tokens)
        return Detokenizer(decoder, stops, params.include_stop_str_in_output)

    def _named_id(self, name: str, model: Mapping[str, Any]) -> int | None:
        """The id of a named token, from the model's settings if the tokenizer's lack it."""
        if name in self._names:
            return self._tokenizer.token_to_id(self._names[name])
        value = model.get(f"{name}_id")
        first = value[0] if isinstance(value, list) and value else value
        return first if isinstance(first, int) else None

    def _token_decoder(self, skip_special_tokens: bool) -> TokenDecoder:
        if self._piece_bytes is not None:
            return ByteDecoder(self._visible_bytes if skip_special_tokens else self._bytes)
        hidden = self.special_token_ids if skip_special_tokens else frozenset[int]()
        return WindowDecoder(functools.partial(self.decode, skip_special_tokens=False), hidden)

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
                f"convert {legacy[0]} once with transformers: "
                f"AutoTokenizer.from_pretrained({str(directory)!r})"
                f".save_pretrained({str(directory)!r})"
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


def _read_optional(file: Path) -> dict[str, Any]:
    values = read_json(file) if file.is_file() else {}
    return {key: value for key, value in values.items() if value is not None}


def _load_settings(directory: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, completed from the older file that may stand beside it."""
    older = _read_optional(directory / "special_tokens_map.json")
    return older | _read_optional(directory / "tokenizer_config.json")


def _content(token: object) -> str | None:
    """The text of a token, which stands in settings as a string or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _decoder_settings(tokenizer: tokenizers.Tokenizer) -> dict[str, Any] | None:
    if tokenizer.decoder is None:
        return None
    settings: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return settings


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
