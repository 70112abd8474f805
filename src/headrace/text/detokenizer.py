"""Token ids to text, one token at a time and in constant time."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
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
    steps = _flatten(decoder) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if not kinds or not _is_sentence_piece(steps):
        return None
    replacements = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
    replacements += [(s["replacement"], " ") for s in steps if s["type"] == "Metaspace"]

    def sentence_piece(piece: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return sentence_piece


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
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
    fused = 2 in ranks
    strips = [fused and step["stop"] == 0 for step in steps if step["type"] == "Strip"]
    replacements = ["String" in step["pattern"] for step in steps if step["type"] == "Replace"]
    return all(strips) and all(replacements)


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


class TokenDecoder(ABC):
    """The text of a growing list of tokens. What has been returned never changes."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Take the next token; return the characters that are now complete."""

    @abstractmethod
    def flush(self) -> str:
        """Return what is left of an incomplete character."""


class ByteDecoder(TokenDecoder):
    """Joins the tokens' bytes and reads them as UTF-8; malformed bytes become U+FFFD.

    Args:
        token_bytes: bytes of a token.
        hidden: tokens that have no text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], hidden: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return "" if token_id in self._hidden else self._decode(self._token_bytes(token_id))

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
        include_stop: whether the stop string is part of the text.
    """

    def __init__(self, decoder: TokenDecoder, stops: StopStrings, include_stop: bool) -> None:
        self._decoder = decoder
        self._stops = stops
        self._include_stop = include_stop
        self._state = stops.start()
        self._held = ""
        self._stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        return self._release(self._decoder.push(token_id))

    def finish(self) -> str:
        released = self._release(self._decoder.flush()) + self._held
        self._held = ""
        return released

    @property
    def stopped_by(self) -> str | None:
        return self._stopped_by

    def _release(self, text: str) -> str:
        if self._stopped_by is not None:
            return ""
        read, self._stopped_by = self._stops.scan(self._state, text)
        known = self._held + text[:read]
        if self._stopped_by is None:
            end = len(known) - max(self._state, default=0)  # what may begin a stop string
            self._held = known[end:]
        else:
            end = len(known) if self._include_stop else len(known) - len(self._stopped_by)
            self._held = ""
        return known[:end]
