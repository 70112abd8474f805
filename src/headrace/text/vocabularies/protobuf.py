"""Protocol buffers, read by hand: as much of the format as a vocabulary file needs.

The wire format is that of "Encoding" in the documentation of Protocol Buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


class Field(NamedTuple):
    """One field of a message.

    Args:
        number: which field it is.
        kind: wire type.
        bits: of a varint; zero for other kinds.
        data: of the other kinds; empty for a varint.

    The methods read it as the type that the message declares; they raise ValueError when the wire
    type is not the one that belongs to it.
    """

    number: int
    kind: int
    bits: int
    data: memoryview

    def integer(self) -> int:
        """An integer or enumerator, negative ones as two's complement of 64 bits."""
        self._expect(_VARINT)
        return self.bits - (1 << 64) if self.bits >> 63 else self.bits

    def flag(self) -> bool:
        """A truth value."""
        self._expect(_VARINT)
        return self.bits != 0

    def float32(self) -> float:
        """A floating-point number of 32 bits."""
        self._expect(_FIXED32)
        number: float = struct.unpack("<f", self.data)[0]
        return number

    def text(self) -> str:
        """A string; UnicodeDecodeError is a ValueError too."""
        self._expect(_BYTES)
        return str(self.data, "utf-8")

    def message(self) -> memoryview:
        """Bytes, or a message to be read further."""
        self._expect(_BYTES)
        return self.data

    def _expect(self, kind: int) -> None:
        if self.kind != kind:
            raise ValueError(f"field {self.number} has wire type {self.kind} instead of {kind}")


Schema = Mapping[int, tuple[str, Callable[[Field], Any]]]
"""The fields of a message that are read: number -> name and type."""


def read_fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message in their order.

    Raises:
        ValueError: the message is damaged or truncated.
    """
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        number, kind = key >> 3, key & 7
        if not number:
            raise ValueError(f"there is no field 0, which stands at byte {position}")
        if kind == _VARINT:
            bits, position = _read_varint(message, position)
            yield Field(number, kind, bits, message[:0])
            continue
        if kind == _BYTES:
            size, position = _read_varint(message, position)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise ValueError(f"field {number} has the unknown wire type {kind}")
        if size > len(message) - position:
            raise ValueError(
                f"field {number} asks for {size} bytes, of which {len(message) - position} are left"
            )
        yield Field(number, kind, 0, message[position : position + size])
        position += size


def read_message(message: memoryview, schema: Schema) -> dict[str, Any]:
    """The values of the fields in ``schema`` that are present; the last of several counts.

    Raises:
        ValueError: the message is damaged, or one of the fields is of another type.
    """
    values = {}
    for field in read_fields(message):
        if field.number in schema:
            name, read = schema[field.number]
            values[name] = read(field)
    return values


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """The integer at ``position``, seven bits in a byte, and the position after it."""
    if position < len(message) and message[position] < 0x80:  # almost all of them
        return message[position], position + 1
    bits = 0
    for index, byte in enumerate(message[position : position + _LONGEST_VARINT]):
        bits |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return bits & ((1 << 64) - 1), position + index + 1
    raise ValueError(f"an integer at byte {position} does not end")
