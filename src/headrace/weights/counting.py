"""What a model's weights come to, without reading them."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

from headrace.ops.linear import Linear
from headrace.ops.packed_weight import WeightFormat, part_shapes
from headrace.weights.absent_linear import AbsentLinear
from headrace.weights.formats import WeightPlan


class WeightCounter:
    """A ``WeightSource`` that counts what a model asks for.

    Args:
        names: the checkpoint's tensors.
        plan: formats of the weights.
        dtype: of what has no format of its own.

    Attributes:
        num_parameters: of the model.
        num_bytes: that they take in memory.
    """

    def __init__(self, names: Container[object], plan: WeightPlan, dtype: torch.dtype) -> None:
        self.num_parameters = self.num_bytes = 0
        self._names, self._plan, self._dtype = names, plan, dtype

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def _count(self, parameters: int, dtype: torch.dtype) -> None:
        self.num_parameters += parameters
        self.num_bytes += parameters * dtype.itemsize

    def vector(self, name: str, size: int) -> Tensor:
        """A parameter ``[size]``."""
        self._count(size, self._dtype)
        return torch.empty(size, dtype=self._dtype, device="meta")

    def embedding(self, name: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        """A table, which beside formats is kept in bf16."""
        self._count(rows * columns, self._dtype if self._plan.body is None else torch.bfloat16)
        return AbsentLinear().rows

    def head(self, name: str, rows: int, columns: int) -> Linear:
        """The output head."""
        return self._weight(rows, columns, self._plan.head, gated=False)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        gated: bool = False,
    ) -> Linear:
        """A stack of weights."""
        if bias:
            self._count(sum(rows), self._dtype)
        return self._weight(sum(rows), columns, self._plan.body, gated)

    def _weight(self, rows: int, columns: int, format: WeightFormat | None, gated: bool) -> Linear:
        if format is None:
            self._count(rows * columns, self._dtype)
            return AbsentLinear()
        self.num_parameters += rows * columns
        parts = part_shapes(format, rows, columns, gated).values()
        self.num_bytes += sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)
        return AbsentLinear()
