"""SentencePiece once more, written for plainness: the reference that tests compare with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from headrace.text.vocabularies.sentence_piece import PieceType, SentencePieceModel

SPACE = "▁"


def encode(
    model: SentencePieceModel, text: str, replacements: Mapping[str, str] | None = None
) -> list[int]:
    """Token ids of a text without special tokens in it.

    Args:
        replacements: what the model's map of characters holds.
    """
    normalized = normalize(model, replace(model, text, replacements or {}))
    pieces = unigram(model, normalized) if model.unigram else bpe(model, normalized)
    return list(token_ids(model, pieces))


def replace(model: SentencePieceModel, text: str, replacements: Mapping[str, str]) -> str:
    """From the left the longest string that has a replacement, but no user-defined symbol."""
    symbols = model.of_type(PieceType.USER_DEFINED)
    replaced = ""
    while text:
        kept = max((s for s in symbols if text.startswith(s)), key=len, default="")
        found = max((s for s in replacements if text.startswith(s)), key=len, default="")
        replaced += kept or (replacements[found] if found else text[0])
        text = text[len(kept or found) or 1 :]
    return replaced


def normalize(model: SentencePieceModel, text: str) -> str:
    """Spaces as the options ask, as "▁"."""
    if model.remove_extra_whitespaces:
        text = " ".join(part for part in text.split(" ") if part)
    if not text:
        return ""
    text = (SPACE if model.add_dummy_prefix else "") + text.replace(" ", SPACE)
    return text.rstrip(SPACE) if model.remove_extra_whitespaces else text


def cut(model: SentencePieceModel, text: str) -> Iterator[tuple[str, bool]]:
    """Characters, and user-defined symbols, which are frozen; of several the longest."""
    symbols = model.of_type(PieceType.USER_DEFINED)
    while text:
        found = max((s for s in symbols if text.startswith(s)), key=len, default="")
        yield found or text[0], bool(found)
        text = text[len(found) or 1 :]


def bpe(model: SentencePieceModel, text: str) -> list[str]:
    """Merge the neighbours with the best score, of equals the leftmost, until there are none."""
    scores = {p.text: p.score for p in model.pieces if p.type is PieceType.NORMAL}
    symbols = list(cut(model, text))
    while True:
        best: tuple[float, int] | None = None
        for index, ((left, frozen), (right, fixed)) in enumerate(pairwise(symbols)):
            score = scores.get(left + right)
            if score is None or frozen or fixed:
                continue
            if best is None or score > best[0]:
                best = (score, index)
        if best is None:
            return [symbol for symbol, _ in symbols]
        index = best[1]
        symbols[index : index + 2] = [(symbols[index][0] + symbols[index + 1][0], False)]


def unigram(model: SentencePieceModel, text: str) -> list[str]:
    """The pieces whose scores have the greatest sum (Viterbi); unknown ones of one character."""
    normal = {p.text: p.score for p in model.pieces if p.type is PieceType.NORMAL}
    scores = dict(normal)
    for symbol in model.of_type(PieceType.USER_DEFINED):
        scores[symbol] = 0.1 * (len(symbol.encode()) - 1)
    unknown = min(normal.values()) - 10.0
    best: list[tuple[float, list[str]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        ways = []
        for start in range(end):
            piece = text[start:end]
            score = scores.get(piece, unknown if len(piece) == 1 else None)
            if score is not None:
                ways.append((best[start][0] + score, [*best[start][1], piece]))
        best.append(max(ways, key=lambda way: way[0]))
    return best[-1][1]


def token_ids(model: SentencePieceModel, pieces: list[str]) -> Iterator[int]:
    """Ids of pieces; unknown ones become bytes, or together one unknown token."""
    textual = (PieceType.NORMAL, PieceType.USER_DEFINED)
    ids = {p.text: i for i, p in enumerate(model.pieces) if p.type in textual}
    octets = {p.text: i for i, p in enumerate(model.pieces) if p.type is PieceType.BYTE}
    [unknown] = [i for i, p in enumerate(model.pieces) if p.type is PieceType.UNKNOWN]
    was_unknown = False
    for piece in pieces:
        if piece not in ids and model.byte_fallback:
            yield from (octets[f"<0x{byte:02X}>"] for byte in piece.encode())
        elif piece in ids or not was_unknown:
            yield ids.get(piece, unknown)
        was_unknown = piece not in ids and not model.byte_fallback
