"""SentencePiece models as tokenizers of the ``tokenizers`` package.

The algorithms are those of "SentencePiece: A simple and language independent subword tokenizer and
detokenizer for Neural Text Processing" (2018), section 3: text is normalized, spaces become "▁",
and pieces are merged by score (BPE) or chosen for the greatest sum of scores (unigram).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from headrace.text.vocabularies.charsmap import CharacterMap

SPACE = "▁"


class PieceType(IntEnum):
    """What a piece is for, numbered as in SentencePiece's files and in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """An entry of the vocabulary. Its token id is its position."""

    text: str
    score: float = 0.0
    type: PieceType = PieceType.NORMAL


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a SentencePiece model says.

    Args:
        pieces: all of different text.
        unigram: the algorithm, BPE if ``False``.
        byte_fallback: characters that no piece has become their bytes.
        add_dummy_prefix: a text begins with one more space.
        remove_extra_whitespaces: none at the ends, and single ones between words.
        charsmap: replacements of characters, for a ``CharacterMap``; empty: none.
        names: texts of the named tokens, such as "bos_token".
    """

    pieces: Sequence[Piece]
    unigram: bool
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""
    names: Mapping[str, str] = field(default_factory=dict)

    def of_type(self, *types: PieceType) -> list[str]:
        """Texts of the pieces of these types."""
        return [piece.text for piece in self.pieces if piece.type in types]


def build_sentence_piece(
    model: SentencePieceModel,
    added: Mapping[str, AddedToken],
    *,
    prefix_once: bool = False,
    preparation: Sequence[normalizers.Normalizer] = (),
) -> tokenizers.Tokenizer:
    """A tokenizer that encodes as the model does.

    Control pieces, and the unknown one, are special tokens: their names in a text become them. The
    text between two special tokens is encoded as a text of its own.

    Where it does not, the package leaves no way: of BPE pieces with equal scores the one with the
    lower id is made first, not the left one (trained scores differ); a BPE piece with a character
    that is no piece itself is never made; a text that is nothing but a user-defined symbol of BPE
    gets no additional space; and sums of unigram scores are not rounded to 32 bits, so of equally
    good ways another may be taken.

    Args:
        added: how pieces of these texts are to be found in a text; their ``special`` counts.
        prefix_once: the additional space is put before the first text only.
        preparation: what is done to a text before all else.

    Raises:
        ValueError: the pieces contradict each other.
    """
    _check(model)
    tokenizer = tokenizers.Tokenizer(_unigram(model) if model.unigram else _bpe(model))
    tokenizer.normalizer = normalizers.Sequence(
        [*preparation, *_normalizers(model, prefix=model.add_dummy_prefix and not prefix_once)]
    )
    splits = _pre_tokenizers(model, prefix=model.add_dummy_prefix and prefix_once)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits) if splits else None
    tokenizer.decoder = _decoder(strip=model.add_dummy_prefix or model.remove_extra_whitespaces)
    tokenizer.add_tokens(list(_added_tokens(model, added, tokenizer.normalizer)))
    return tokenizer


def _check(model: SentencePieceModel) -> None:
    """Refuse what SentencePiece would not load either."""
    seen: dict[str, int] = {}
    for index, piece in enumerate(model.pieces):
        if not piece.text:
            raise ValueError(f"piece {index} is empty")
        if piece.text in seen:
            raise ValueError(f"pieces {seen[piece.text]} and {index} are both {piece.text!r}")
        if not math.isfinite(piece.score):
            raise ValueError(f"the score of piece {index} is {piece.score}")
        seen[piece.text] = index
    unknown = len(model.of_type(PieceType.UNKNOWN))
    if unknown != 1:
        raise ValueError(f"{unknown} pieces stand for unknown characters instead of one")


def _bpe(model: SentencePieceModel) -> models.BPE:
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    [unknown] = model.of_type(PieceType.UNKNOWN)
    return models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for *_, left, right in sorted(_merges(model.pieces))],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[float, int, int, str, str]]:
    """The pairs that make a piece, each behind what it is sorted by: the best score comes first.

    SentencePiece has no list of merges: any two neighbours that make a piece may merge.
    """
    normal = {p.text: i for i, p in enumerate(pieces) if p.type is PieceType.NORMAL}
    for text, index in normal.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                yield -pieces[index].score, index, -cut, left, right


def _unigram(model: SentencePieceModel) -> models.Unigram:
    vocabulary = []
    for piece in model.pieces:
        # A score of zero leaves the lowest one alone, on which that of unknown characters hangs.
        text, score = piece.text, 0.0
        if piece.type is PieceType.NORMAL:
            score = piece.score
        elif piece.type is PieceType.USER_DEFINED:
            score = 0.1 * (
                len(text.encode()) - 1
            )  # as SentencePiece has it, whatever the file says
        elif piece.type is PieceType.UNUSED:
            text = f" {text}"  # no text has a space any more when it comes to pieces
        vocabulary.append((text, score))
    [unknown] = [i for i, p in enumerate(model.pieces) if p.type is PieceType.UNKNOWN]
    return models.Unigram(
        vocab=vocabulary,
        unk_id=unknown,
        byte_fallback=model.byte_fallback,
    )


def _normalizers(model: SentencePieceModel, prefix: bool) -> Iterator[normalizers.Normalizer]:
    """What becomes of a text before pieces are found in it."""
    symbols = model.of_type(PieceType.USER_DEFINED)
    if model.charsmap:
        yield normalizers.Normalizer.custom(CharacterMap(model.charsmap, symbols))
    if model.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)
    alone = ""
    if symbols and not model.unigram:
        # The package normalizes the symbols too before it looks for them; they stay as they are.
        choices = "|".join(map(re.escape, symbols))
        alone = rf"(?<!{SPACE})(?!\A(?:{choices})\z)"
        if prefix:
            yield normalizers.Replace(Regex(rf"\A{SPACE}(?=(?:{choices})\z)"), "")
    if model.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(rf"{alone}{SPACE}+\z"), "")


def _pre_tokenizers(model: SentencePieceModel, prefix: bool) -> list[pre_tokenizers.PreTokenizer]:
    splits: list[pre_tokenizers.PreTokenizer] = []
    if prefix:
        # Only this one knows where a text begins. It would not double a space of its own kind.
        splits.append(pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False))
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False))
    if model.unigram and model.byte_fallback:
        # The names of bytes are pieces like others to the package, but not in a text.
        name_of_byte = Regex("<(?=0x[0-9A-F]{2}>)")
        splits.append(pre_tokenizers.Split(name_of_byte, behavior="merged_with_previous"))
    return splits


def _decoder(strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _added_tokens(
    model: SentencePieceModel, added: Mapping[str, AddedToken], normalizer: normalizers.Normalizer
) -> Iterator[AddedToken]:
    """The pieces that are looked for before the algorithm sees a text.

    Special ones stand in the text as they are. The symbols of a BPE model stand in the normalized
    text, where a symbol of several "▁" is several spaces.
    """
    for piece in model.pieces:
        marked = added.get(piece.text)
        symbol = piece.type is PieceType.USER_DEFINED and not model.unigram
        always = piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
        if not (marked or symbol or always):
            continue
        special = marked.special if marked else always
        plain = symbol and not special and normalizer.normalize_str(piece.text) == piece.text
        yield AddedToken(
            piece.text,
            special=special,
            normalized=plain,
            lstrip=bool(marked and marked.lstrip),
            rstrip=bool(marked and marked.rstrip),
            single_word=bool(marked and marked.single_word),
        )
