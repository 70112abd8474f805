"""SentencePiece's model files, such as ``tokenizer.model``.

The messages and their fields are those of ``sentencepiece_model.proto``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError
from headrace.text.vocabularies.protobuf import Field, Schema, read_fields, read_message
from headrace.text.vocabularies.sentence_piece import Piece, PieceType, SentencePieceModel

_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_PIECE: Schema = {
    1: ("text", Field.text),
    2: ("score", Field.float32),
    3: ("type", Field.integer),
}
_AS_SUFFIX = "treat_whitespace_as_suffix"
_TRAINER: Schema = {
    3: ("model_type", Field.integer),
    24: (_AS_SUFFIX, Field.flag),
    35: ("byte_fallback", Field.flag),
    45: ("unk_piece", Field.text),
    46: ("bos_piece", Field.text),
    47: ("eos_piece", Field.text),
    48: ("pad_piece", Field.text),
}
_NORMALIZER: Schema = {
    2: ("precompiled_charsmap", Field.message),
    3: ("add_dummy_prefix", Field.flag),
    4: ("remove_extra_whitespaces", Field.flag),
    5: ("escape_whitespaces", Field.flag),
}
_UNIGRAM, _BPE = 1, 2
_NAMED_PIECES = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}


def read_sentence_piece(path: Path) -> SentencePieceModel:
    """The model in a file.

    Raises:
        CheckpointError: it is damaged, or of a kind that is not supported.
    """
    try:
        return _parse(memoryview(path.read_bytes()), path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a SentencePiece model ({error}); download it again"
        ) from error


def _parse(data: memoryview, path: Path) -> SentencePieceModel:
    """Raises ValueError for damage."""
    pieces = []
    trainer: dict[str, Any] = {}
    normalizer: dict[str, Any] = {}
    for field in read_fields(data):
        if field.number == _PIECES:
            pieces.append(_piece(read_message(field.message(), _PIECE)))
        elif field.number == _TRAINER_SPEC:
            trainer |= read_message(field.message(), _TRAINER)
        elif field.number == _NORMALIZER_SPEC:
            normalizer |= read_message(field.message(), _NORMALIZER)
    if not pieces:
        raise ValueError("it has no pieces")
    algorithm = trainer.get("model_type", _UNIGRAM)
    escaped = normalizer.get("escape_whitespaces", True)
    if algorithm not in (_UNIGRAM, _BPE) or not escaped or trainer.get(_AS_SUFFIX):
        raise CheckpointError(
            f"{path}: only models of type unigram (1) and BPE (2) are supported that mark spaces "
            f"before words; this one is of type {algorithm}, with escape_whitespaces {escaped} and "
            f"{_AS_SUFFIX} {trainer.get(_AS_SUFFIX, False)}; take a checkpoint with tokenizer.json"
        )
    return SentencePieceModel(
        pieces=pieces,
        unigram=algorithm == _UNIGRAM,
        byte_fallback=trainer.get("byte_fallback", False),
        add_dummy_prefix=normalizer.get("add_dummy_prefix", True),
        remove_extra_whitespaces=normalizer.get("remove_extra_whitespaces", True),
        charsmap=bytes(normalizer.get("precompiled_charsmap", b"")),
        names=_names(pieces, trainer),
    )


def _piece(values: dict[str, Any]) -> Piece:
    kind = PieceType(values.get("type", PieceType.NORMAL))
    return Piece(values.get("text", ""), values.get("score", 0.0), kind)


def _names(pieces: list[Piece], trainer: dict[str, Any]) -> dict[str, str]:
    """The tokens that the model itself names, as far as it has them."""
    special = {p.text for p in pieces if p.type in (PieceType.CONTROL, PieceType.UNKNOWN)}
    named = {
        f"{name}_token": trainer.get(f"{name}_piece", usual)
        for name, usual in _NAMED_PIECES.items()
    }
    return {name: text for name, text in named.items() if text in special}
