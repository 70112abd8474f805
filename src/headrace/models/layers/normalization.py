"""Norms of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from headrace.models.base import WeightSource
from headrace.ops.linear import RMSNorm


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Layer Normalization, section 3: weight and bias ``[K]``, what is added to the variance."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """``[T, K]`` -> the same shape."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def read_rms_norm(
    weights: WeightSource, name: str, size: int, eps: float, offset: float = 0.0
) -> RMSNorm:
    """The norm whose weight is ``name + ".weight"``, stored without an ``offset``."""
    weight = weights.vector(f"{name}.weight", size)
    return RMSNorm(weight + offset if offset else weight, eps)


def read_layer_norm(weights: WeightSource, name: str, size: int, eps: float) -> LayerNorm:
    """The norm whose weight and bias are ``name + ".weight"`` and ``name + ".bias"``."""
    bias = weights.vector(f"{name}.bias", size) if f"{name}.bias" in weights else None
    return LayerNorm(weights.vector(f"{name}.weight", size), bias, eps)
