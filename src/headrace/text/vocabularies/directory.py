"""The vocabulary of a Hugging Face directory, in whichever files it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from headrace.errors import CheckpointError
from headrace.json_file import read_json
from headrace.text.chat_template import load_chat_templates
from headrace.text.vocabularies.added_tokens import (
    described_tokens,
    place_tokens,
    put_around,
    read_added_tokens,
    special_texts,
)
from headrace.text.vocabularies.byte_level import build_byte_level, read_merges
from headrace.text.vocabularies.pre_tokenizers import GPT2, QWEN2
from headrace.text.vocabularies.sentence_piece_classes import load_sentence_piece
from headrace.text.vocabularies.settings import Settings
from headrace.text.vocabularies.vocabulary import Vocabulary
from headrace.text.vocabularies.word_piece import build_word_piece, read_word_list

Loaded = tuple[tokenizers.Tokenizer, dict[str, str]]
"""A tokenizer and the texts of its named tokens."""

_END_OF_TEXT = "<|endoftext|>"
_GPT2_NAMES = {f"{name}_token": _END_OF_TEXT for name in ("bos", "eos", "unk")}
_QWEN2_NAMES = {f"{name}_token": _END_OF_TEXT for name in ("eos", "pad")}
_ROBERTA_NAMES = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_BERT_NAMES = {
    f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")
}
_BYTE_LEVEL_CLASSES = {
    "": _GPT2_NAMES,
    "GPT2Tokenizer": _GPT2_NAMES,
    "Qwen2Tokenizer": _QWEN2_NAMES,
    "RobertaTokenizer": _ROBERTA_NAMES,
}
_WORD_PIECE_CLASSES = ("", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")


def read_directory(directory: Path) -> Vocabulary:
    """What the files of a directory say of its tokenizer.

    Raises:
        CheckpointError: a file is missing, damaged, or of a kind that is not known; it names the
            file and the fix.
    """
    load = _find_loader(directory)
    settings = Settings.read(directory)
    tokenizer, names = load(settings)
    _add_named_tokens(tokenizer, [*names.values(), *special_texts(settings.values)])
    model = read_json(directory / "config.json", required=False)
    return Vocabulary(
        tokenizer=tokenizer,
        names=names,
        templates=load_chat_templates(directory, settings.values.get("chat_template")),
        bos_token_id=_named_id(tokenizer, names, "bos_token", model),
        eos_token_id=_named_id(tokenizer, names, "eos_token", model),
    )


def _find_loader(directory: Path) -> Callable[[Settings], Loaded]:
    """The first whose files are all there."""
    for files, load in _LOADERS:
        if all((directory / file).is_file() for file in files):
            return load
    looked_for = ", ".join(" with ".join(files) for files, _ in _LOADERS)
    raise CheckpointError(
        f"{directory} has no tokenizer: there is none of {looked_for}; copy it from where the "
        "model came from"
    )


def _load_json(settings: Settings) -> Loaded:
    """A ``tokenizer.json`` says all itself, but for the names of tokens."""
    file = settings.directory / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises nothing narrower, and its panics this
        raise CheckpointError(f"{file} is damaged ({error}); download it again") from error
    # The file may hold settings of the training run; a prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, settings.names({})


def _load_sentence_piece(name: str, settings: Settings) -> Loaded:
    return load_sentence_piece(settings.directory / name, settings)


def _load_byte_level(settings: Settings) -> Loaded:
    """``vocab.json`` and ``merges.txt``, as GPT-2 has them."""
    file, kind = settings.directory / "vocab.json", settings.tokenizer_class
    names = settings.names(_known(file, kind, _BYTE_LEVEL_CLASSES))
    added = read_added_tokens(settings.directory, settings.values)
    tokenizer = build_byte_level(
        place_tokens(_token_ids(file), added, file),
        read_merges(settings.directory / "merges.txt"),
        QWEN2 if kind == "Qwen2Tokenizer" else GPT2,
        file,
        adds_space=settings.flag("add_prefix_space", False),
    )
    tokenizer.add_tokens(list(added.values()))
    _describe(tokenizer, settings)
    is_roberta = kind == "RobertaTokenizer"
    begins = settings.flag("add_bos_token", is_roberta)
    ends = settings.flag("add_eos_token", is_roberta)
    before, after = names.get("bos_token"), names.get("eos_token")
    put_around(tokenizer, before if begins else None, after if ends else None, file)
    return tokenizer, names


def _load_word_piece(settings: Settings) -> Loaded:
    """``vocab.txt``, as BERT has it."""
    file = settings.directory / "vocab.txt"
    usual = _known(file, settings.tokenizer_class, dict.fromkeys(_WORD_PIECE_CLASSES, _BERT_NAMES))
    if not settings.flag("do_basic_tokenize", True):
        raise CheckpointError(
            f"{file}: the setting do_basic_tokenize false is not supported; take a checkpoint with "
            "tokenizer.json"
        )
    names = settings.names(usual)
    added = read_added_tokens(settings.directory, settings.values)
    strip = settings.flag("strip_accents", settings.flag("do_lower_case", True))
    tokenizer = build_word_piece(
        place_tokens(read_word_list(file), added, file),
        names.get("unk_token", ""),
        file,
        lowercase=settings.flag("do_lower_case", True),
        strip_accents=strip,
        separates_ideographs=settings.flag("tokenize_chinese_chars", True),
    )
    tokenizer.add_tokens(list(added.values()))
    _describe(tokenizer, settings)
    put_around(tokenizer, names.get("cls_token"), names.get("sep_token"), file)
    return tokenizer, names


_LOADERS: Sequence[tuple[tuple[str, ...], Callable[[Settings], Loaded]]] = (
    (("tokenizer.json",), _load_json),
    *(
        ((name,), functools.partial(_load_sentence_piece, name))
        for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    ),
    (("vocab.json", "merges.txt"), _load_byte_level),
    (("vocab.txt",), _load_word_piece),
)


def _known(file: Path, kind: str, classes: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """What a tokenizer class calls its tokens. Raises CheckpointError if it is not known."""
    if kind not in classes:
        raise CheckpointError(
            f"{file}: what tokenizer_class {kind!r} makes of it is not known; known are "
            f"{', '.join(filter(None, classes))}; convert it once with transformers: "
            f"AutoTokenizer.from_pretrained({str(file.parent)!r}).save_pretrained(...)"
        )
    return classes[kind]


def _token_ids(file: Path) -> dict[str, int]:
    """A ``vocab.json``. Raises CheckpointError."""
    vocabulary = read_json(file)
    ids = set(vocabulary.values()) if all(type(i) is int for i in vocabulary.values()) else set()
    if not ids or min(ids) < 0 or len(ids) < len(vocabulary):
        raise CheckpointError(
            f"{file} must map tokens to ids that differ and are not negative; fetch it again"
        )
    return vocabulary


def _describe(tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
    """Find named tokens in a text as the settings describe them."""
    described = described_tokens(settings.values)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens(
        [
            token
            for token in described
            if token.content not in known and tokenizer.token_to_id(token.content) is not None
        ]
    )


def _add_named_tokens(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> None:
    """Make special what has a name, as far as the vocabulary has it."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens(
        [text for text in texts if text not in known and tokenizer.token_to_id(text) is not None]
    )


def _named_id(
    tokenizer: tokenizers.Tokenizer, names: Mapping[str, str], name: str, model: Mapping[str, Any]
) -> int | None:
    """The id of a named token, from the model's settings if the tokenizer's lack it."""
    if name in names:
        return tokenizer.token_to_id(names[name])
    value = model.get(f"{name}_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else None
