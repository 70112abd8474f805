"""Rotary position embedding: frequencies out of a configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from headrace.errors import CheckpointError

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
        try:
            if kind == "linear":
                frequencies = frequencies / scaling["factor"]
            elif kind == "llama3":
                frequencies = _llama3_frequencies(frequencies, scaling)
            elif kind != "default":
                raise CheckpointError(
                    f"rope scaling {kind!r} is not supported; known: {', '.join(SUPPORTED_SCALING)}"
                )
        except KeyError as error:
            raise CheckpointError(f"rope scaling {kind!r} lacks {error.args[0]!r}") from None
        self.frequencies = frequencies

    @classmethod
    def from_config(cls, config: dict[str, Any], width: int) -> RotaryEmbedding:
        """Out of ``config.json``, in its old form (``rope_theta``, ``rope_scaling``) or its new
        one (``rope_parameters``).
        """
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
        return cls(width, float(theta), scaling)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[T, width / 2]`` for ``positions`` ``[T]``, computed in fp32."""
        angles = torch.outer(positions.float(), self.frequencies.to(positions.device))
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _llama3_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Low frequencies divided by ``factor``, high ones kept, smooth between (Llama 3.1)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, blended)
    return torch.where(wavelengths < original / high, frequencies, scaled)
