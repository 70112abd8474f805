"""Rotary position embedding: frequencies out of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.models.layers.values import read_number, read_numbers, read_positive

Parameters = Mapping[str, Any]


class RotaryEmbedding:
    """Cosines and sines of positions (RoFormer, section 3.2).

    Args:
        frequencies: ``[width / 2]``: of the pairs that elements i and i + width / 2 of a head are;
            0 where a pair is not to be turned.
        factor: of cosines and sines, where pairs are turned (YaRN, section 3.4).
    """

    def __init__(self, frequencies: Tensor, factor: float = 1.0) -> None:
        self.frequencies = frequencies
        self._factors = torch.where(frequencies == 0, 1.0, factor)

    @classmethod
    def identity(cls, width: int) -> RotaryEmbedding:
        """For layers that know no positions (NoPE)."""
        return cls(torch.zeros(width // 2))

    @classmethod
    def from_config(
        cls, config: dict[str, Any], width: int, kind: str | None = None, rotated: int | None = None
    ) -> RotaryEmbedding:
        """Out of ``config.json``, for heads of ``width``.

        Reads its old form (``rope_theta``, ``rope_scaling``) or its new one (``rope_parameters``).
        Where a file has both, the old scaling counts.

        Args:
            kind: of layer, where the file has parameters for each kind.
            rotated: elements of a head that are turned; all by default.

        Raises:
            CheckpointError: the type of scaling is not supported, or a parameter is missing; or all
                elements are to be turned and the file asks for a part of them.
        """
        values = _parameters(config, kind)
        share = read_number(values, "partial_rotary_factor", 1.0)
        if rotated is None and share != 1.0:
            raise CheckpointError(
                f"config.json: partial_rotary_factor {share} is not supported for this architecture"
            )
        rotated = width if rotated is None else rotated
        if rotated % 2 or width % 2 or rotated > width:
            raise CheckpointError(
                "config.json: RoPE must turn an even part of heads of even width, and of head_dim "
                f"{width} it is {rotated}"
            )
        theta = read_number(values, "rope_theta", 10000.0)
        if theta <= 1:
            raise CheckpointError(f"config.json: rope_theta must be above 1, got {theta}")
        exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
        name = values.get("rope_type") or "default"
        if not isinstance(name, str) or name not in SCALINGS:
            raise CheckpointError(
                f"config.json: rope scaling {name!r} is not supported; known: {', '.join(SCALINGS)}"
            )
        frequencies, factor = SCALINGS[name](1.0 / (theta**exponents), values)
        unturned = torch.zeros((width - rotated) // 2)
        return cls(torch.cat((frequencies, unturned)), factor)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[T, width / 2]`` for ``positions`` ``[T]``, computed in fp32."""
        angles = torch.outer(positions.float(), self.frequencies.to(positions.device))
        factors = self._factors.to(positions.device)
        return (angles.cos() * factors).to(dtype), (angles.sin() * factors).to(dtype)


def head_order(width: int, rotated: int, *, interleaved: bool = False) -> list[int]:
    """Elements of a head so that those turned together are i and i + width / 2.

    ``rotated`` elements come first in the checkpoint, pairs either half of them apart or, with
    ``interleaved``, side by side. Queries and keys in the same order have the same products.
    """
    if interleaved:
        first, second = list(range(0, rotated, 2)), list(range(1, rotated, 2))
    else:
        first, second = list(range(rotated // 2)), list(range(rotated // 2, rotated))
    middle = rotated + (width - rotated) // 2
    return [*first, *range(rotated, middle), *second, *range(middle, width)]


def repeat_order(order: Sequence[int], count: int, stride: int | None = None) -> list[int]:
    """``order`` for ``count`` heads, ``stride`` rows apart (one after another by default)."""
    step = len(order) if stride is None else stride
    return [head * step + element for head in range(count) for element in order]


def yarn_scale(factor: float, coefficient: float = 1.0) -> float:
    """How attention sharpens where positions are ``factor`` times denser (YaRN, section 3.4)."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """All parameters of RoPE in a ``config.json`` of one kind of layers."""
    return _parameters(config, None)


def rotated_part(config: dict[str, Any], width: int, share: float = 1.0) -> int:
    """Elements of a head that are turned; ``share`` of them where ``config.json`` does not say."""
    return int(width * read_number(rope_parameters(config), "partial_rotary_factor", share))


def _parameters(config: dict[str, Any], kind: str | None) -> dict[str, Any]:
    new, old = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise CheckpointError(f"config.json: RoPE needs a set of parameters, got {new!r} {old!r}")
    if kind is not None and isinstance(new.get(kind), dict):
        new = new[kind]
    if "type" in old:  # what the type was called at first
        old = {"rope_type": old["type"], **old}
    if any(isinstance(value, dict) for value in (*new.values(), *old.values())):
        raise CheckpointError(
            f"config.json: RoPE needs one set of parameters for all layers, got {new or old!r}"
        )
    return {**config, **new, **old}


def _default(frequencies: Tensor, values: Parameters) -> tuple[Tensor, float]:
    return frequencies, 1.0


def _linear(frequencies: Tensor, values: Parameters) -> tuple[Tensor, float]:
    return frequencies / read_number(values, "factor"), 1.0


def _llama3(frequencies: Tensor, values: Parameters) -> tuple[Tensor, float]:
    """Low frequencies divided by ``factor``, high ones kept, smooth between (Llama 3.1)."""
    names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    factor, original, low, high = (read_number(values, name) for name in names)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, blended)
    return torch.where(wavelengths < original / high, frequencies, scaled), 1.0


def _original_context(values: Parameters) -> float:
    original = read_number(values, "original_max_position_embeddings")
    if original <= 1:
        raise CheckpointError(
            f"config.json: original_max_position_embeddings must be above 1, got {original}"
        )
    return original


def _yarn(frequencies: Tensor, values: Parameters) -> tuple[Tensor, float]:
    """Frequencies that turn seldom within the original context are divided (YaRN, section 3.2)."""
    original, theta = _original_context(values), read_number(values, "rope_theta", 10000.0)
    factor = read_number(values, "factor", _extension(values))
    width = 2 * len(frequencies)

    def turning(times: float) -> float:
        """The element whose frequency turns so often within the original context."""
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = turning(read_number(values, "beta_fast", 32.0))
    high = turning(read_number(values, "beta_slow", 1.0))
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(len(frequencies)) - low) / (high - low or 0.001)
    divided = ramp.clamp(0, 1)
    scaled = frequencies / factor * divided + frequencies * (1 - divided)
    sharpness = read_positive(values, "attention_factor")
    if sharpness is None:
        one, all_dim = (read_positive(values, name) for name in ("mscale", "mscale_all_dim"))
        if one is not None and all_dim is not None:
            sharpness = yarn_scale(factor, one) / yarn_scale(factor, all_dim)
        else:
            sharpness = yarn_scale(factor)
    return scaled, sharpness


def _longrope(frequencies: Tensor, values: Parameters) -> tuple[Tensor, float]:
    """Each frequency divided by a factor of its own (LongRoPE, section 3.3).

    The long factors serve contexts beyond the original one, for short prompts too: a cache holds
    keys that were turned one way.
    """
    original, whole = _original_context(values), read_number(values, "max_position_embeddings")
    context = min(whole, read_number(values, "max_model_len", whole))
    name = "long_factor" if context > original else "short_factor"
    divisors = read_numbers(values, name, len(frequencies))
    factor = read_number(values, "factor", _extension(values))
    sharpness = read_positive(values, "attention_factor")
    if sharpness is None:
        grown = 1 + math.log(factor) / math.log(original) if factor > 1 else 1.0
        sharpness = math.sqrt(grown)
    return frequencies / torch.tensor(divisors, dtype=torch.float32), sharpness


def _extension(values: Parameters) -> float:
    """How many times the original context the whole one is."""
    return read_number(values, "max_position_embeddings") / _original_context(values)


SCALINGS: dict[str, Callable[[Tensor, Parameters], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""``rope_type`` -> frequencies and the factor of cosines and sines."""
