"""Unquantized linear weights."""

from __future__ import annotations

from torch import Tensor

from headrace.ops.table import Ops


class DenseLinear:
    """``x @ weight^T + bias`` in the compute dtype.

    Args:
        weight: ``[out, in]``; packed by the device's operation, once, if it has a layout for it.
        bias: ``[out]`` or ``None``.
    """

    __slots__ = ("_bias", "_linear", "_weight", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None, ops: Ops) -> None:
        self._weight = ops.pack_weight(weight)
        self._bias = bias
        self._linear = ops.linear
        self.packed = self._weight is not weight

    def __call__(self, x: Tensor) -> Tensor:
        """``[T, in]`` -> ``[T, out]``."""
        return self._linear(x, self._weight, self._bias)
