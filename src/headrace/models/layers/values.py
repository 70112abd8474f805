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


def read_count(config: Mapping[str, Any], name: str, default: int = 0) -> int:
    """An integer of at least 0; ``default`` where it is absent or null. Raises CheckpointError."""
    value = _read(config, name, default)
    return 0 if value == 0 and not isinstance(value, bool) else read_size(config, name, default)


def read_head_width(
    config: Mapping[str, Any],
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
) -> int:
    """Width of heads that share the hidden state evenly. Raises CheckpointError."""
    size, count = read_size(config, hidden), read_size(config, heads)
    if size % count:
        raise CheckpointError(f"config.json: {hidden} {size} must be a multiple of {heads} {count}")
    return size // count


def read_list(config: Mapping[str, Any], name: str) -> list[Any] | None:
    """A list; ``None`` where it is absent or null. Raises CheckpointError."""
    value = config.get(name)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"config.json: {name} must be a list, got {value!r}")
    return value


def read_number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number; ``default`` where it is absent or null. Raises CheckpointError."""
    value = _read(config, name, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value > 0:
        raise CheckpointError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def read_positive(config: Mapping[str, Any], name: str) -> float | None:
    """A positive number; ``None`` where it is absent, null or 0. Raises CheckpointError."""
    return read_number(config, name) if config.get(name) else None


def read_interval(config: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Two numbers, the second at least the first; from 0 to infinity where they are absent.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(name)
    if value is None:
        return 0.0, float("inf")
    try:
        # JSON has no infinity: transformers writes {"__float__": "Infinity"}.
        ends: list[Any] = [end["__float__"] if isinstance(end, dict) else end for end in value]
        low, high = map(float, ends)
        if low <= high:
            return low, high
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"config.json: {name} must be two ascending numbers, got {value!r}")


def read_numbers(
    config: Mapping[str, Any], name: str, count: int, default: float | None = None
) -> list[float]:
    """So many numbers; ``default`` each where they are absent or null. Raises CheckpointError."""
    values = read_list(config, name)
    if values is None and default is None:
        raise CheckpointError(f"config.json lacks {name!r}")
    if values is None:
        values = [default] * count
    if not {type(value) for value in values} <= {int, float} or len(values) != count:
        raise CheckpointError(f"config.json: {name} must be {count} numbers, got {values!r}")
    return [float(value) for value in values]


def read_layer_kinds(config: Mapping[str, Any], *known: str) -> list[str] | None:
    """What ``layer_types`` calls each layer; ``None`` where it is absent.

    Raises:
        CheckpointError: it is no list for all layers, or names a kind that is not known.
    """
    kinds = read_list(config, "layer_types")
    if kinds is None:
        return None
    layers = read_size(config, "num_hidden_layers")
    if len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types must name {layers} layers, got {kinds!r}")
    for kind in kinds:
        if kind not in known:
            raise CheckpointError(
                f"config.json: layer_types: {kind!r} is not supported; known: {', '.join(known)}"
            )
    return kinds


def _read(config: Mapping[str, Any], name: str, default: float | None) -> Any:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json lacks {name!r}")
    return value
