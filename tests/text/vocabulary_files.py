"""Vocabularies in the forms that checkpoints have beside ``tokenizer.json``, made from trained
ones.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from headrace.text.vocabularies.sentence_piece import Piece, PieceType, SentencePieceModel
from tests.text.builders import TEXT

NUMBERS = (
    "In 2024 the wheel's water (1,234,567 litres) wasn't  enough...\r\n\tWe'LL see 99.9% e\u0301"
)
"""A text with what families of tokenizers cut in different ways."""

SPECIAL = [
    Piece("<unk>", 0.0, PieceType.UNKNOWN),
    Piece("<s>", 0.0, PieceType.CONTROL),
    Piece("</s>", 0.0, PieceType.CONTROL),
]

BYTES = [Piece(f"<0x{byte:02X}>", 0.0, PieceType.BYTE) for byte in range(256)]


def is_plain(text: str) -> bool:
    """Whether no name of these pieces stands in a text."""
    return not any(piece.text in text for piece in SPECIAL)


# SentencePiece


def bpe_pieces() -> list[Piece]:
    """Trained pieces, the sooner merged the better."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        [TEXT] * 4, trainers.BpeTrainer(vocab_size=260, show_progress=False)
    )
    # The end of a line is a symbol in some models.
    vocabulary = {text: i for text, i in tokenizer.get_vocab().items() if "\n" not in text}
    merged = [text for text in sorted(vocabulary, key=vocabulary.__getitem__) if len(text) > 1]
    single = [text for text in vocabulary if len(text) == 1]
    return [Piece(text, -float(rank)) for rank, text in enumerate([*merged, *sorted(single)])]


def unigram_pieces() -> list[Piece]:
    """Trained pieces with the logarithms of their probabilities."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    entries = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [
        Piece(text, float32(score))
        for text, score in entries
        if text != "<unk>" and "\n" not in text
    ]


def float32(number: float) -> float:
    """As it comes back from a file."""
    rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return rounded


def varint(number: int) -> bytes:
    """Seven bits in a byte, the least ones first."""
    number &= (1 << 64) - 1
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def wire(number: int, value: bool | int | float | str | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model_bytes(model: SentencePieceModel, trainer: Mapping[int, Any] | None = None) -> bytes:
    """A SentencePiece model file.

    Args:
        trainer: further fields of ``trainer_spec``.
    """
    pieces = [wire(1, p.text) + wire(2, p.score) + wire(3, int(p.type)) for p in model.pieces]
    spec = {3: 1 if model.unigram else 2, 35: model.byte_fallback} | dict(trainer or {})
    options = {3: model.add_dummy_prefix, 4: model.remove_extra_whitespaces}
    normalizer = [wire(1, "test"), wire(2, model.charsmap)]
    normalizer += [wire(number, value) for number, value in options.items()]
    return b"".join(
        [
            *(wire(1, piece) for piece in pieces),
            wire(2, b"".join(wire(number, value) for number, value in spec.items())),
            wire(3, b"".join(normalizer)),
        ]
    )


def charsmap_bytes(replacements: Mapping[str, str]) -> bytes:
    """A precompiled character map: each node of its trie has a block of 256 units to itself."""
    nodes = {b"": 0}
    for text in replacements:
        for length in range(1, len(text.encode()) + 1):
            nodes.setdefault(text.encode()[:length], len(nodes))
    strings = b"".join(text.encode() + b"\0" for text in replacements.values())
    starts, start = {}, 0
    for key, text in replacements.items():
        starts[key.encode()] = start
        start += len(text.encode()) + 1
    units = [0] * 256 * (len(nodes) + 1)
    for key, block in nodes.items():
        base = 256 * (block + 1)
        position = 256 * (nodes[key[:-1]] + 1) ^ key[-1] if key else 0
        offset = position ^ base
        packed = offset << 10 if offset < 1 << 21 else offset >> 8 << 10 | 1 << 9
        units[position] = packed | (key[-1] if key else 0)
        if key in starts:
            units[position] |= 1 << 8
            units[base] = starts[key] | 1 << 31
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + strings


SYMBOLS = [Piece(text, 0.0, PieceType.USER_DEFINED) for text in ("▁▁", "▁▁▁", "<tool>", "\n")]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
REPLACEMENTS = {"ａ": "a", "①": "1", "\t": " ", "ﬃ": "ffi", "e\u0301": "é", "\u200b": ""}


def sentence_piece_models() -> dict[str, SentencePieceModel]:
    """Models with every option, by a name."""
    merged = bpe_pieces()
    pieces = [*SPECIAL, *unigram_pieces()]
    llama = SentencePieceModel(
        [*SPECIAL, *BYTES, *merged],
        unigram=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        names=NAMES,
    )
    symbols = replace(llama, pieces=[*llama.pieces, *SYMBOLS])
    t5 = SentencePieceModel(pieces, unigram=True, names=NAMES)
    octets = replace(t5, pieces=[*pieces, *BYTES], byte_fallback=True)
    return {
        "llama": llama,
        "gemma": replace(symbols, add_dummy_prefix=False),
        "symbols behind a prefix": symbols,
        "no bytes": replace(llama, pieces=[*SPECIAL, *merged], byte_fallback=False),
        "single spaces": replace(llama, remove_extra_whitespaces=True),
        "t5": t5,
        "unigram symbols": replace(t5, pieces=[*pieces, *SYMBOLS]),
        "unigram bytes": replace(octets, remove_extra_whitespaces=False),
    }


MODELS = sentence_piece_models()


# Directories


def write_model(
    directory: Path,
    model: SentencePieceModel,
    settings: Mapping[str, Any] | None = None,
    name: str = "tokenizer.model",
) -> Path:
    """A directory with a SentencePiece model."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(model_bytes(model))
    return write_settings(directory, settings)


def write_merges(
    directory: Path, tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any] | None = None
) -> Path:
    """A directory with the ``vocab.json`` and ``merges.txt`` of a BPE tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return write_settings(directory, settings)


def write_words(
    directory: Path, words: Sequence[str], settings: Mapping[str, Any] | None = None
) -> Path:
    """A directory with a ``vocab.txt``."""
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return write_settings(directory, settings)


def write_settings(directory: Path, settings: Mapping[str, Any] | None) -> Path:
    """Write ``tokenizer_config.json`` if there is something to say; return the directory."""
    if settings is not None:
        text = json.dumps(settings)
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return directory


def words() -> list[str]:
    """A trained WordPiece vocabulary; ids are positions."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


WORDS = words()


# GGUF


def gguf(model: str, texts: Iterable[str], **entries: Any) -> dict[str, Any]:
    """The metadata of a GGUF file about its tokenizer; keys are given without their prefix."""
    values = {"model": model, "tokens": list(texts), **entries}
    metadata = {f"tokenizer.ggml.{name.replace('__', '.')}": v for name, v in values.items()}
    return {"general.architecture": "llama", **metadata}


def gguf_pieces(model: str, pieces: Sequence[Piece], **entries: Any) -> dict[str, Any]:
    """The same for SentencePiece's vocabularies."""
    return gguf(
        model,
        [piece.text for piece in pieces],
        scores=[piece.score for piece in pieces],
        token_type=[int(piece.type) for piece in pieces],
        **entries,
    )
