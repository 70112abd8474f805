"""Tokens that a checkpoint adds to a vocabulary, and those that it puts around a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from headrace.errors import CheckpointError
from headrace.json_file import read_json

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
MOST_TOKENS = 1 << 21
"""Ids of added tokens are less; the greatest vocabularies have an eighth of it."""
_FLAGS = ("lstrip", "rstrip", "single_word", "special")


def token_text(token: object) -> str | None:
    """The text of a token, which stands in settings as a string or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def special_texts(settings: Mapping[str, Any]) -> list[str]:
    """Texts of the tokens that the settings make special beside the named ones."""
    lists = [settings.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    texts = [token_text(token) for each in lists if isinstance(each, list) for token in each]
    return [text for text in texts if text]


def read_added_tokens(directory: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens that a directory without ``tokenizer.json`` adds, by id.

    They are listed in ``settings``, or else in ``added_tokens.json``.

    Raises:
        CheckpointError: the list is damaged.
    """
    file, entry = directory / "tokenizer_config.json", "added_tokens_decoder"
    listed = settings.get(entry)
    if listed is None:
        file, entry = directory / "added_tokens.json", "it"
        listed = {i: {"content": text} for text, i in read_json(file, required=False).items()}
    try:
        tokens = {int(index): _added_token(token) for index, token in listed.items()}
    except (AttributeError, TypeError, ValueError):
        tokens = {-1: AddedToken("")}
    if not all(0 <= i < MOST_TOKENS and token.content for i, token in tokens.items()):
        raise CheckpointError(f"{file}: {entry} must name tokens by their ids; fetch it again")
    special = {token_text(settings.get(name)) for name in NAMED_TOKENS} | {*special_texts(settings)}
    for token in tokens.values():
        token.special = token.special or token.content in special
    return dict(sorted(tokens.items()))


def described_tokens(settings: Mapping[str, Any]) -> list[AddedToken]:
    """The named tokens that stand in the settings as objects."""
    objects = [settings.get(name) for name in NAMED_TOKENS]
    tokens = [
        _added_token({**each, "special": True}) for each in objects if isinstance(each, Mapping)
    ]
    return [token for token in tokens if token.content]


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    """As the settings describe it, but found in the text as it stands, not in normalized text."""
    flags = {name: bool(token.get(name, False)) for name in _FLAGS}
    return AddedToken(token_text(token) or "", normalized=False, **flags)


def place_tokens(
    vocabulary: Mapping[str, int], added: Mapping[int, AddedToken], origin: Path
) -> dict[str, int]:
    """A vocabulary in which the added tokens have their ids, and take the place of others there.

    Raises:
        CheckpointError: a token has another id already.
    """
    texts = {token.content for token in added.values()}
    placed = {text: i for text, i in vocabulary.items() if i not in added or text in texts}
    for index, token in added.items():
        if placed.setdefault(token.content, index) != index:
            raise misplaced(origin, token.content, placed[token.content], index)
    return placed


def misplaced(origin: Path, text: str, found: int, asked: int) -> CheckpointError:
    """Why a token that has an id cannot be given another one."""
    return CheckpointError(
        f"{origin}: the token {text!r} has id {found}, but the settings beside it say {asked}; "
        "they do not belong together"
    )


def put_around(
    tokenizer: tokenizers.Tokenizer, before: str | None, after: str | None, origin: Path | str
) -> None:
    """Put tokens around every text that is encoded with its special tokens.

    Args:
        before, after: a token of the vocabulary, or ``None``.

    Raises:
        CheckpointError: the vocabulary has no such token.
    """
    single = [*(["before"] if before else []), "$A", *(["after"] if after else [])]
    special = []
    for label, text in (("before", before), ("after", after)):
        if text is None:
            continue
        index = tokenizer.token_to_id(text)
        if index is None:
            raise CheckpointError(
                f"{origin}: the token {text!r} is to be put {label} every text, but the vocabulary "
                "does not have it; fetch the files again"
            )
        special.append({"id": label, "ids": [index], "tokens": [text]})
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
