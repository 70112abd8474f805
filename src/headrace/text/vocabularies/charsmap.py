"""SentencePiece's maps of characters: which strings become which before pieces are found.

In a file a map is a trie as a double array, and replacement strings. The trie is laid out as in
darts-clone, after "An Efficient Digital Search Algorithm by Using a Double-Array Structure" (1989).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator

from tokenizers import NormalizedString, Regex

_VALUE = 1 << 31
_LEAF = 1 << 8
_LABEL = 0xFF
_WIDE_OFFSET = 1 << 9
_BLOCK = 256
_LONGEST_KEY = 128
"""In bytes, ten times as long as in the maps that SentencePiece comes with; a damaged map could
have keys without end.
"""
_WHOLE = Regex(r"(?m)\A.+\z")


class CharacterMap:
    """Replaces, from the left, the longest strings that a map has.

    It is a normalizer for the ``tokenizers`` package, whose own one replaces whole grapheme
    clusters by what their beginning becomes, and so loses characters.

    Args:
        charsmap: size of the trie in bytes (uint32), its units (uint32 each), and zero-terminated
            strings in UTF-8; all little-endian.
        kept: strings that stay as they are, wherever they stand.

    Raises:
        ValueError: the map is damaged: a lookup could lead out of it.
    """

    def __init__(self, charsmap: bytes, kept: Iterable[str] = ()) -> None:
        size = int.from_bytes(charsmap[:4], "little")
        if len(charsmap) < 4 or size % 4 or not 0 < size <= len(charsmap) - 4:
            raise ValueError(
                f"a character map of {len(charsmap)} bytes cannot hold a trie of {size}"
            )
        self._units = struct.unpack(f"<{size // 4}I", charsmap[4 : 4 + size])
        self._strings = charsmap[4 + size :]
        self._check()
        choices = "|".join(map(re.escape, sorted(kept, key=len, reverse=True)))
        self._kept = re.compile(f"({choices})" if choices else r"(\Z.)")

    def normalize(self, normalized: NormalizedString) -> None:
        """Change a text of the package."""
        parts = self._kept.split(normalized.normalized)
        parts[::2] = [b"".join(self._replaced(part.encode())).decode() for part in parts[::2]]
        normalized.replace(_WHOLE, "".join(parts))

    def _check(self) -> None:
        self._strings.decode()
        if not self._strings.endswith(b"\0"):
            raise ValueError("the strings of the character map do not end")
        ends = [index + 1 for index, byte in enumerate(self._strings) if not byte]
        starts = {0, *ends[:-1]}
        for position, unit in enumerate(self._units):
            if unit & _VALUE and position:  # a lookup begins at the first, whatever it is
                continue
            base = _base(position, unit)
            if base // _BLOCK * _BLOCK + _BLOCK > len(self._units):
                raise ValueError(f"unit {position} of the character map leads out of the trie")
            if unit & _LEAF and self._units[base] & ~_VALUE not in starts:
                raise ValueError(f"unit {position} of the character map leads to no string")

    def _replaced(self, text: bytes) -> Iterator[bytes]:
        position = 0
        while position < len(text):
            size, start = self._longest(text, position)
            if size:
                yield self._strings[start : self._strings.index(b"\0", start)]
            else:
                size = _length(text[position])
                yield text[position : position + size]
            position += size

    def _longest(self, text: bytes, position: int) -> tuple[int, int]:
        """How much of the text from ``position`` on is replaced, and where by what stands."""
        size = start = 0
        base = _base(0, self._units[0])
        for end in range(position, min(position + _LONGEST_KEY, len(text))):
            below = base ^ text[end]
            unit = self._units[below]
            if not text[end] or unit & (_VALUE | _LABEL) != text[end]:
                break  # no key holds a zero, which ends keys in the trie
            base = _base(below, unit)
            if unit & _LEAF:
                size, start = end + 1 - position, self._units[base] & ~_VALUE
        # A map that cuts characters is damaged in a way that a check of its units does not show.
        is_whole = position + size == len(text) or text[position + size] & 0xC0 != 0x80
        return (size, start) if is_whole else (0, 0)


def _base(position: int, unit: int) -> int:
    """Where the children of a unit are: each at this position ^ its byte, the value at itself."""
    return position ^ ((unit >> 10) << (8 if unit & _WIDE_OFFSET else 0))


def _length(first: int) -> int:
    """Bytes of a character in UTF-8 by the first of them."""
    return 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
