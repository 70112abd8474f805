"""Rotary position embedding: frequencies out of a configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.models.layers.values import read_number

SUPPORTED_SCALING = ("default", "linear", "llama3")


class RotaryEmbedding:
    """Cosines and sines of positions, for heads of ``width`` (RoFormer, section 3.2).

    Args:
        width: rotated part of a head.
        theta: base of the frequencies.
        scaling: ``rope_type`` and its parameters, as in ``config.json``.

    Raises:
        CheckpointError: the type of scaling is not supported, or a parameter is missing.
    """

    def __init__(self, width: int, theta: float, scaling: dict[str, Any] | None = None) -> None:
        exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
        frequencies = 1.0 / (theta**exponents)
        scaling = scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "linear":
            frequencies = frequencies / read_number(scaling, "factor")
        elif kind == "llama3":
            frequencies = _llama3_frequencies(frequencies, scaling)
        elif kind != "default":
            raise CheckpointError(
                f"config.json: rope scaling {kind!r} is not supported; known: "
                f"{', '.join(SUPPORTED_SCALING)}"
            )
        self.frequencies = frequencies

    @classmethod
    def from_config(cls, config: dict[str, Any], width: int) -> RotaryEmbedding:
        """Out of ``config.json``, in its old form (``rope_theta``, ``rope_scaling``) or its new
        one (``rope_parameters``). Where a file has both, the old scaling counts.
        """
        new, old = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
        for scaling in (new, old):
            if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
                raise CheckpointError(
                    f"config.json: RoPE needs one set of parameters for all layers, got {scaling!r}"
                )
        values = {**config, **new, **old}
        if read_number(values, "partial_rotary_factor", 1.0) != 1.0 or width % 2:
            raise CheckpointError(
                f"config.json: RoPE must turn whole heads of even width; head_dim is {width}, "
                f"partial_rotary_factor {values.get('partial_rotary_factor')}"
            )
        return cls(width, read_number(values, "rope_theta", 10000.0), old or new)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[T, width / 2]`` for ``positions`` ``[T]``, computed in fp32."""
        angles = torch.outer(positions.float(), self.frequencies.to(positions.device))
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _llama3_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Low frequencies divided by ``factor``, high ones kept, smooth between (Llama 3.1)."""
    names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    factor, original, low, high = (read_number(scaling, name) for name in names)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, blended)
    return torch.where(wavelengths < original / high, frequencies, scaled)
