"""Fields of ``quantization_config``, checked where they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from headrace.errors import CheckpointError

SECTION = "config.json: quantization_config"
FIX = "take the model's unquantized checkpoint, and quantize it with `headrace quantize`"

Value = TypeVar("Value", str, int, bool)


def unsupported(field: str, value: object, known: Sequence[object] = ()) -> CheckpointError:
    """The error that a field has a value that is not read; names those that are."""
    listed = f", only {', '.join(map(str, known))}" if known else ""
    return CheckpointError(f"{SECTION}: {field} {value!r} is not supported{listed}; {FIX}")


def choose(field: str, value: object, known: Sequence[Value]) -> Value:
    """The one of ``known`` that a value is. Raises CheckpointError: it is none of them."""
    for choice in known:
        if choice == value:
            return choice
    raise unsupported(field, value, known)


def read_choice(
    section: Mapping[str, Any],
    field: str,
    known: Sequence[Value],
    default: Value | None = None,
) -> Value:
    """A field that has one of the values ``known``; ``default`` where it is absent or null.

    Raises:
        CheckpointError: it has another value, or none and there is no default.
    """
    value = section.get(field)
    return choose(field, default if value is None else value, known)


def read_object(section: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """A field that is an object; empty where it is absent or null. Raises CheckpointError."""
    value = section.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise unsupported(field, value, ("an object",))
    return value


def read_group(section: Mapping[str, Any]) -> int | None:
    """``group_size``, columns that share a scale; ``None``, written as -1: all of a row.

    Raises:
        CheckpointError: it is absent or no such number.
    """
    value = section.get("group_size")
    if value == -1:
        return None
    if not _is_size(value):
        raise unsupported("group_size", value, ("a positive integer", -1))
    assert isinstance(value, int)
    return value


def read_block(section: Mapping[str, Any], field: str) -> tuple[int, int] | None:
    """Rows and columns of a block, written as a list; ``None`` where it is absent or null.

    Raises:
        CheckpointError: it is no list of two positive integers.
    """
    value = section.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_size, value)):
        raise unsupported(field, value, ("two positive integers",))
    return value[0], value[1]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
