"""RoPE: from metadata and tensors to the words of ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.weights.gguf.architectures.hyperparameters import Hyperparameters

_FACTORS, _LONG, _SHORT = (
    f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short")
)
ROPE_TENSORS = (_FACTORS, _LONG, _SHORT)
"""Tensors that are no weights: divisors of frequencies."""


def read_rope(values: Hyperparameters, width: int, *, partial: bool = False) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and, if not all of a head is turned, the share that is.

    Args:
        width: of a head.
        partial: whether the architecture can turn a part of a head.

    Raises:
        CheckpointError: the type of scaling is unknown, or a value is missing or impossible.
    """
    config: dict[str, Any] = {"rope_theta": values.number("rope.freq_base", default=10000.0)}
    rotated = values.size("rope.dimension_count", default=width)
    if rotated != width:
        if not partial or rotated > width:
            raise values.fail(f"rope.dimension_count is {rotated}, and heads have {width} elements")
        config["partial_rotary_factor"] = rotated / width
    scaling = _read_scaling(values)
    return config if scaling is None else {**config, "rope_scaling": scaling}


def _read_scaling(values: Hyperparameters) -> dict[str, Any] | None:
    if _FACTORS in values:
        return _llama3(values)
    # A factor alone has meant linear scaling from the beginning.
    name = values.text("rope.scaling.type", "linear")
    if name not in _SCALINGS:
        raise values.fail(
            f"rope.scaling.type {name!r} is not supported, only {', '.join(_SCALINGS)}"
        )
    return _SCALINGS[name](values)


def _divisors(values: Hyperparameters, long: str, short: str) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": values.tensor(long).values().tolist(),
        "short_factor": values.tensor(short).values().tolist(),
    }


def _llama3(values: Hyperparameters) -> dict[str, Any]:
    """Of Llama 3.1's scaling, files have the divisors and not what they were made from.

    As LongRoPE, whose long and short divisors are then the same, they give the same frequencies.
    """
    return {
        **_divisors(values, _FACTORS, _FACTORS),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": values.size("context_length"),
    }


def _none(values: Hyperparameters) -> None:
    return None


def _linear(values: Hyperparameters) -> dict[str, Any] | None:
    factor = values.number("rope.scaling.factor", "rope.scale_linear", default=1.0)
    return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}


def _original_context(values: Hyperparameters) -> int:
    return values.size("rope.scaling.original_context_length")


def _optional(values: Hyperparameters, **keys: str) -> dict[str, Any]:
    """Numbers under ``rope.scaling.``, of those there are, by their names in ``config.json``."""
    found = {name: values.optional_number(f"rope.scaling.{key}") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def _yarn(values: Hyperparameters) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": values.number("rope.scaling.factor"),
        "original_max_position_embeddings": _original_context(values),
        **_optional(
            values,
            attention_factor="yarn_attn_factor",
            beta_fast="yarn_beta_fast",
            beta_slow="yarn_beta_slow",
        ),
    }


def _longrope(values: Hyperparameters) -> dict[str, Any]:
    return {
        **_divisors(values, _LONG, _SHORT),
        "original_max_position_embeddings": _original_context(values),
        **_optional(values, attention_factor="attn_factor"),
    }


_SCALINGS: dict[str, Callable[[Hyperparameters], dict[str, Any] | None]] = {
    "none": _none,
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""``rope.scaling.type`` -> what it is in ``config.json``."""
