"""The vocabulary in the metadata of a GGUF file.

The keys are those of "GGUF", section "Tokenizer", in the documentation of ggml; what they mean
where it does not say, and what is usual where a key is absent, is as in llama.cpp.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken

from headrace.errors import CheckpointError
from headrace.text.chat_template import ChatTemplate
from headrace.text.vocabularies.added_tokens import put_around
from headrace.text.vocabularies.byte_level import build_byte_level
from headrace.text.vocabularies.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from headrace.text.vocabularies.sentence_piece import (
    SPACE,
    Piece,
    PieceType,
    SentencePieceModel,
    build_sentence_piece,
)
from headrace.text.vocabularies.vocabulary import Vocabulary
from headrace.text.vocabularies.word_piece import CONTINUATION, build_word_piece

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # so it is spelled
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


@dataclass(frozen=True, slots=True)
class _Metadata:
    """The entries of a file about its tokenizer, checked as they are read.

    Args:
        values: all metadata.
        origin: the file, for error messages.
    """

    values: Mapping[str, Any]
    origin: str

    def text(self, name: str, usual: str | None = None) -> str:
        """A string; required where none is usual."""
        value = self.values.get(_PREFIX + name, usual)
        if not isinstance(value, str):
            raise self.wrong(name, "must be a string")
        return value

    def flag(self, name: str, usual: bool) -> bool:
        """A truth value."""
        value = self.values.get(_PREFIX + name, usual)
        if not isinstance(value, int) or value not in (0, 1):
            raise self.wrong(name, "must be true or false")
        return bool(value)

    def strings(self, name: str) -> list[str]:
        """A list of strings."""
        values = self._list(name)
        if not values or not all(isinstance(value, str) for value in values):
            raise self.wrong(name, "must be a list of strings")
        try:
            "".join(values).encode()
        except UnicodeEncodeError as error:
            raise self.wrong(name, "has strings that are no UTF-8") from error
        return values

    def numbers(self, name: str, count: int, usual: float) -> list[float]:
        """``count`` numbers; all the usual one if the entry is absent."""
        if _PREFIX + name not in self.values:
            return [usual] * count
        try:
            numbers = [float(value) for value in self._list(name)]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != count:
            raise self.wrong(name, f"must be a list of {count} numbers, one for each token")
        return numbers

    def token_id(self, name: str, count: int, usual: int | None = None) -> int | None:
        """An id below ``count``, or else the usual one, if that is below."""
        value = self.values.get(_PREFIX + name)
        if value is None:
            return usual if usual is not None and usual < count else None
        try:
            index = operator.index(value)
        except TypeError:
            index = -1
        if not 0 <= index < count:
            raise self.wrong(name, f"must be a token id below {count}, not {value!r}")
        return index

    def octets(self, name: str) -> bytes:
        """Bytes, as a list of integers with or without a sign; empty if the entry is absent."""
        try:
            return bytes(int(value) & 0xFF for value in self._list(name))
        except (TypeError, ValueError):
            raise self.wrong(name, "must be a list of bytes") from None

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(_PREFIX + name, ())
        if not isinstance(value, str):
            with contextlib.suppress(TypeError):
                return list(value)
        raise self.wrong(name, "must be a list")

    def unknown(self, name: str, value: str, known: Iterable[str]) -> CheckpointError:
        """An entry that names something which is not supported."""
        return CheckpointError(
            f"{self.origin}: {_PREFIX}{name} is {value!r}, which is not known; known are "
            f"{', '.join(known)}; take the checkpoint that the file was converted from"
        )

    def wrong(self, name: str, what: str) -> CheckpointError:
        """An entry that cannot be used."""
        return CheckpointError(f"{self.origin}: {_PREFIX}{name} {what}; convert the model again")


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The vocabulary that all kinds have.

    Args:
        texts: of the tokens, all different; a token's id is its position.
        scores, types: one for each token.
        ids: of the named tokens that there are.
    """

    texts: list[str]
    scores: list[float]
    types: list[PieceType]
    ids: dict[str, int]

    def name(self, token: str) -> str | None:
        """Text of a named token."""
        return self.texts[self.ids[token]] if token in self.ids else None


def read_gguf(values: Mapping[str, Any], origin: str) -> Vocabulary:
    """What the metadata of a GGUF file say of its tokenizer.

    Args:
        values: all metadata, by key; lists may be any iterables.
        origin: the file, for error messages.

    Raises:
        CheckpointError: an entry is missing, damaged, or of a kind that is not known; it names the
            key.
    """
    metadata = _Metadata(values, origin)
    model = metadata.text("model")
    if model not in _KINDS:
        raise metadata.unknown("model", model, _KINDS)
    kind = _KINDS[model]
    tokens = _read_tokens(metadata, kind.ids)
    try:
        tokenizer = kind.build(metadata, tokens)
    except ValueError as error:
        raise CheckpointError(
            f"{origin}: the vocabulary is damaged: {error}; download the file again"
        ) from error
    named = {name: tokens.texts[index] for name, index in tokens.ids.items()}
    return Vocabulary(
        tokenizer=tokenizer,
        names=named,
        templates=_read_templates(metadata),
        bos_token_id=tokens.ids.get("bos_token"),
        eos_token_id=tokens.ids.get("eos_token"),
    )


def _read_tokens(metadata: _Metadata, usual_ids: Mapping[str, int]) -> _Tokens:
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(metadata.strings("tokens"))]
    if len(set(texts)) < len(texts):
        [(text, count)] = Counter(texts).most_common(1)
        raise metadata.wrong("tokens", f"has {text!r} {count} times")
    scores = metadata.numbers("scores", len(texts), 0.0)
    numbers = metadata.numbers("token_type", len(texts), PieceType.NORMAL)
    try:
        types = [PieceType(int(number or PieceType.NORMAL)) for number in numbers]
    except (ValueError, OverflowError) as error:
        raise metadata.wrong("token_type", f"has an unknown type ({error})") from error
    found = {
        name: metadata.token_id(key, len(texts), usual_ids.get(name)) for name, key in _IDS.items()
    }
    ids = {name: index for name, index in found.items() if index is not None}
    return _Tokens(texts, scores, types, ids)


def _read_templates(metadata: _Metadata) -> dict[str, ChatTemplate]:
    """The chat templates, of which all but the usual one have a name in their key."""
    templates = {}
    for key, source in metadata.values.items():
        name = "default" if key == _TEMPLATE else key.removeprefix(f"{_TEMPLATE}.")
        if name == key:
            continue
        if not isinstance(source, str):
            raise CheckpointError(
                f"{metadata.origin}: {key} must be a string; convert the model again"
            )
        templates[name] = ChatTemplate(source, metadata.origin, name)
    return templates


def _build_llama(metadata: _Metadata, tokens: _Tokens) -> tokenizers.Tokenizer:
    """BPE of SentencePiece. The file does not mark the spaces in user-defined symbols."""
    texts = [
        text.replace(" ", SPACE) if kind is PieceType.USER_DEFINED else text
        for text, kind in zip(tokens.texts, tokens.types, strict=True)
    ]
    model = SentencePieceModel(
        pieces=_pieces(texts, tokens),
        unigram=False,
        byte_fallback=True,
        add_dummy_prefix=metadata.flag("add_space_prefix", True),
        remove_extra_whitespaces=False,
    )
    tokenizer = build_sentence_piece(model, {})
    _put_flagged(metadata, tokens, tokenizer, begins=True)
    return tokenizer


def _build_t5(metadata: _Metadata, tokens: _Tokens) -> tokenizers.Tokenizer:
    """Unigram of SentencePiece."""
    model = SentencePieceModel(
        pieces=_pieces(tokens.texts, tokens),
        unigram=True,
        byte_fallback=PieceType.BYTE in tokens.types,
        add_dummy_prefix=metadata.flag("add_space_prefix", False),
        remove_extra_whitespaces=metadata.flag("remove_extra_whitespaces", False),
        charsmap=metadata.octets("precompiled_charsmap"),
    )
    tokenizer = build_sentence_piece(model, {})
    _put_flagged(metadata, tokens, tokenizer, ends=True)
    return tokenizer


def _pieces(texts: Sequence[str], tokens: _Tokens) -> list[Piece]:
    """The pieces; the unknown one is unknown even where the file does not give types."""
    pieces = [Piece(*each) for each in zip(texts, tokens.scores, tokens.types, strict=True)]
    index = tokens.ids.get("unk_token")
    if index is not None and PieceType.UNKNOWN not in tokens.types:
        pieces[index] = pieces[index]._replace(type=PieceType.UNKNOWN)
    return pieces


def _build_gpt2(metadata: _Metadata, tokens: _Tokens) -> tokenizers.Tokenizer:
    """Byte-level BPE."""
    way = _pre_tokenizer(metadata)
    merges = []
    for merge in metadata.strings("merges"):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise metadata.wrong("merges", f"has {merge!r}, which is no pair of tokens")
        merges.append((merge[:cut], merge[cut + 1 :]))
    vocabulary = {text: index for index, text in enumerate(tokens.texts)}
    tokenizer = build_byte_level(vocabulary, merges, way, metadata.origin)
    _add_typed_tokens(tokenizer, tokens)
    _put_flagged(metadata, tokens, tokenizer, begins=way.adds_bos)
    return tokenizer


def _pre_tokenizer(metadata: _Metadata) -> PreTokenizer:
    name = metadata.text("pre", "default")
    if name not in PRE_TOKENIZERS:
        raise metadata.unknown("pre", name, PRE_TOKENIZERS)
    return PRE_TOKENIZERS[name]


def _build_bert(metadata: _Metadata, tokens: _Tokens) -> tokenizers.Tokenizer:
    """WordPiece. The file marks the pieces that begin a word instead of those that continue one."""

    def word_piece(text: str, kind: PieceType) -> str:
        if kind is not PieceType.NORMAL or (text[0] == "[" and text[-1] == "]" and len(text) > 2):
            return text
        return text[1:] if text[0] == SPACE else CONTINUATION + text

    pairs = zip(tokens.texts, tokens.types, strict=True)
    vocabulary = {word_piece(*pair): index for index, pair in enumerate(pairs)}
    lowercase = metadata.flag("normalizer.lowercase", True)
    tokenizer = build_word_piece(
        vocabulary,
        tokens.name("unk_token") or "",
        metadata.origin,
        lowercase=lowercase,
        strip_accents=metadata.flag("normalizer.strip_accents", lowercase),
    )
    _add_typed_tokens(tokenizer, tokens)
    before = tokens.name("cls_token") or tokens.name("bos_token")
    put_around(tokenizer, before, tokens.name("sep_token"), metadata.origin)
    return tokenizer


def _add_typed_tokens(tokenizer: tokenizers.Tokenizer, tokens: _Tokens) -> None:
    """Find special tokens and user-defined symbols in a text before all else."""
    special = (PieceType.CONTROL, PieceType.UNKNOWN)
    added = {
        text: AddedToken(text, special=kind in special, normalized=False)
        for text, kind in zip(tokens.texts, tokens.types, strict=True)
        if kind is PieceType.USER_DEFINED or kind in special
    }
    tokenizer.add_tokens(list(added.values()))


def _put_flagged(
    metadata: _Metadata,
    tokens: _Tokens,
    tokenizer: tokenizers.Tokenizer,
    *,
    begins: bool = False,
    ends: bool = False,
) -> None:
    """Put tokens around a text as the flags in the file say, or else as is usual."""
    around = []
    for flag, usual, name in (
        ("add_bos_token", begins, "bos_token"),
        ("add_eos_token", ends, "eos_token"),
    ):
        asked = metadata.flag(flag, usual)
        if asked and name not in tokens.ids:
            raise metadata.wrong(_IDS[name], f"is missing, but {flag} asks for the token")
        around.append(tokens.name(name) if asked else None)
    put_around(tokenizer, around[0], around[1], metadata.origin)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What ``tokenizer.ggml.model`` may be.

    Args:
        build: makes the tokenizer.
        ids: of named tokens where the file does not give them.
    """

    build: Callable[[_Metadata, _Tokens], tokenizers.Tokenizer]
    ids: Mapping[str, int]


_KINDS = {
    "llama": _Kind(_build_llama, {"unk_token": 0, "bos_token": 1, "eos_token": 2}),
    "gpt2": _Kind(_build_gpt2, {}),
    "bert": _Kind(
        _build_bert,
        {"pad_token": 0, "unk_token": 100, "bos_token": 101, "sep_token": 102, "mask_token": 103},
    ),
    "t5": _Kind(_build_t5, {"pad_token": 0, "eos_token": 1, "unk_token": 2}),
}
