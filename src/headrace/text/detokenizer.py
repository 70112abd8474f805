"""Token ids to text, one token at a time and in constant time."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from headrace.contracts.text import TextStream
from headrace.text.stop_strings import StopStrings

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_PENDING = 16
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")

PieceBytes = Callable[[str], bytes]
"""The bytes that a token, given as its string in the vocabulary, stands for."""


def piece_bytes(decoder: dict[str, Any] | None) -> PieceBytes | None:
    """How to turn vocabulary strings into bytes under a tokenizer's decoder.

    Args:
        decoder: the ``decoder`` object of a ``tokenizer.json``.

    Returns:
        ``None`` when a token's bytes depend on its neighbours under this decoder.
    """
    steps = _flatten(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if kinds and _is_sentence_piece(steps):
        replacements = [_replacement(s) for s in steps if s["type"] in ("Replace", "Metaspace")]
        return _sentence_piece(replacements, "ByteFallback" in kinds)
    return None


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    return [decoder]


def _is_sentence_piece(steps: list[dict[str, Any]]) -> bool:
    """Whether the steps work on each token alone, but for a strip at the start of the text.

    That strip undoes the space which the encoder put before a text; text that continues a
    prompt has none, so a stream leaves it out.
    """
    order = {"Replace": 0, "Metaspace": 0, "ByteFallback": 1, "Fuse": 2, "Strip": 3}
    ranks = [order.get(step["type"], -1) for step in steps]
    if -1 in ranks or ranks != sorted(ranks):
        return False
    fused = {"type": "Fuse"} in steps
    strips = [step for step in steps if step["type"] == "Strip"]
    patterns = [step["pattern"] for step in steps if step["type"] == "Replace"]
    return all(fused and s["stop"] == 0 for s in strips) and all("String" in p for p in patterns)


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    return step["pattern"]["String"], step["content"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's names for bytes: printable ones stand for themselves, the rest come from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    names = printable + [0x100 + index for index in range(len(others))]
    return {chr(name): byte for name, byte in zip(names, printable + others, strict=True)}


_BYTE_OF = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:  # an added token in plain text
        return piece.encode()


def _sentence_piece(replacements: list[tuple[str, str]], byte_fallback: bool) -> PieceBytes:
    def to_bytes(piece: str) -> bytes:
        if byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return to_bytes


class TokenBytes(dict[int, bytes]):
    """Token id -> bytes, filled in as tokens are met.

    Args:
        to_bytes: the bytes of a token that is not in the table yet.
        hidden: tokens that stand for nothing.
    """

    def __init__(self, to_bytes: Callable[[int], bytes], hidden: Iterable[int] = ()) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._to_bytes = to_bytes

    def __missing__(self, token_id: int) -> bytes:
        value = self[token_id] = self._to_bytes(token_id)
        return value


class TokenDecoder(ABC):
    """The text of a growing list of tokens. What has been returned never changes."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Take the next token; return the characters that are now complete."""

    @abstractmethod
    def flush(self) -> str:
        """Return what is left of an incomplete character."""


class ByteDecoder(TokenDecoder):
    """Joins the tokens' bytes and reads them as UTF-8; malformed bytes become U+FFFD."""

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._table[token_id])

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDecoder(TokenDecoder):
    """For decoders that look at a token's neighbours: decodes the newest tokens again together
    with those before them, and takes the difference.

    Invariant: ``_window`` holds the ``_context`` tokens released last, whose text is ``_prefix``,
    and then the pending ones.

    Args:
        decode: text of a list of token ids.
        hidden: tokens that have no text.
    """

    def __init__(self, decode: Callable[[list[int]], str], hidden: frozenset[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._window: list[int] = []
        self._context = 0
        self._prefix = ""

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        incomplete = text.endswith(_REPLACEMENT) or len(text) <= len(self._prefix)
        if incomplete and len(self._window) - self._context < _LONGEST_PENDING:
            return ""
        return self._release(text)

    def flush(self) -> str:
        return self._release(self._decode(self._window))

    def _release(self, text: str) -> str:
        released = text[len(self._prefix) :]
        del self._window[: self._context]
        self._context = len(self._window)
        self._prefix = self._decode(self._window)
        return released


class Detokenizer(TextStream):
    """A stream of text that ends before (or after) the first stop string.

    The first stop string is the one whose last character comes first; of several that end there,
    the longest. So the text does not depend on how it was cut into tokens.

    Args:
        decoder: of this sequence alone.
        stops: ``None`` when there are no stop strings.
        include_stop: whether the stop string is part of the text.
    """

    def __init__(
        self, decoder: TokenDecoder, stops: StopStrings | None, include_stop: bool
    ) -> None:
        self._decoder = decoder
        self._stops = stops
        self._include_stop = include_stop
        self._state = 0
        self._held = ""
        self._stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        text = self._decoder.push(token_id)
        return text if self._stops is None else self._release(self._stops, text)

    def finish(self) -> str:
        text = self._decoder.flush()
        if self._stops is None:
            return text
        released = self._release(self._stops, text) + self._held
        self._held = ""
        return released

    @property
    def stopped_by(self) -> str | None:
        return self._stopped_by

    def _release(self, stops: StopStrings, text: str) -> str:
        if self._stopped_by is not None:
            return ""
        self._state, read, self._stopped_by = stops.scan(self._state, text)
        known = self._held + text[:read]
        if self._stopped_by is None:
            end = len(known) - stops.open_length(self._state)
            self._held = known[end:]
        else:
            end = len(known) if self._include_stop else len(known) - len(self._stopped_by)
            self._held = ""
        return known[:end]
