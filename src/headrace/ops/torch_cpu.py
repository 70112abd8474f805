"""Faster versions for x86 CPUs out of torch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.linear import ReferenceLinear, RMSNorm

_ROWS_HINT = 16
"""oneDNN chooses the blocked layout for this many rows; it serves any number."""


def packs_weights() -> bool:
    """Whether oneDNN is there and multiplies bf16 on this CPU."""
    available = torch.backends.mkldnn.is_available()
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension, in one call."""
    return F.rms_norm(x, weight.shape, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 * width]``, with one temporary."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class TorchCpuLinear(ReferenceLinear):
    """bf16 weights in oneDNN's blocked layout, which saves a reorder per call."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._packs = dtype == torch.bfloat16 and packs_weights()
        self.dense_layout = "opaque" if self._packs else "plain"

    def ready(self, weight: Tensor) -> Tensor:
        if not self._packs:
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        return packed

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._packs:
            return super().multiply(x, weight, bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return rms_norm(x, norm.weight, norm.eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return silu_and_mul(gate_up)
