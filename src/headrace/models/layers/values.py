"""Values out of ``config.json``, checked where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import CheckpointError


def read_size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer; ``default`` where it is absent or null. Raises CheckpointError."""
    value = _read(config, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def read_number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number; ``default`` where it is absent or null. Raises CheckpointError."""
    value = _read(config, name, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value > 0:
        raise CheckpointError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def _read(config: Mapping[str, Any], name: str, default: float | None) -> Any:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json lacks {name!r}")
    return value
