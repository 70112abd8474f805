"""What a model's weights come to, without reading them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace.ops.linear import Linear, LinearOps
from headrace.ops.packed_weight import WeightFormat, part_shapes
from headrace.weights.absent_linear import AbsentLinear
from headrace.weights.formats import WeightPlan
from headrace.weights.loader import stored_pieces
from headrace.weights.reader import Stack, WeightReader
from headrace.weights.stored_blocks import Piece


class WeightCounter:
    """A ``WeightSource`` that counts what a model asks for.

    Args:
        reader: of the checkpoint.
        plan: formats of the weights.
        linears: that would multiply.
        dtype: of what has no format of its own.

    Attributes:
        num_parameters: of the model.
        num_bytes: that they take in memory.
        kept: parameters of linear weights by what they are stored as and kept as.
    """

    def __init__(
        self, reader: WeightReader, plan: WeightPlan, linears: LinearOps, dtype: torch.dtype
    ) -> None:
        self.num_parameters = self.num_bytes = 0
        self.kept: Counter[tuple[str, str]] = Counter()
        self._reader, self._plan, self._linears, self._dtype = reader, plan, linears, dtype

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def _count(self, parameters: int, dtype: torch.dtype) -> None:
        self.num_parameters += parameters
        self.num_bytes += parameters * dtype.itemsize

    def vector(self, name: str, size: int) -> Tensor:
        """A parameter ``[size]``."""
        self._count(size, self._dtype)
        return torch.empty(size, dtype=self._dtype, device="meta")

    def embedding(self, name: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        """A table, which beside formats is kept in bf16, and as it is if it is of integers."""
        stack = Stack([name], [rows], columns)
        if stored_pieces(self._reader, stack, self._linears, self._plan.body):
            self._weight(stack, None)
            return AbsentLinear().rows
        self._count(rows * columns, self._dtype if self._plan.body is None else torch.bfloat16)
        return AbsentLinear().rows

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A parameter of any shape."""
        self._count(math.prod(shape), dtype or self._dtype)
        return torch.empty(tuple(shape), dtype=dtype or self._dtype, device="meta")

    def head(self, name: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
        """The output head."""
        return self._weight(Stack([name], [rows], columns, bias), self._plan.head)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        gated: bool = False,
        order: Sequence[int] | None = None,
        adaptable: bool = True,
    ) -> Linear:
        """A stack of weights."""
        return self._weight(Stack(names, rows, columns, bias, gated, order), self._plan.body)

    def _weight(self, stack: Stack, format: WeightFormat | None) -> Linear:
        if stack.bias:
            self._count(stack.total, self._dtype)
        if format is None:
            self._stored(stack)
            return AbsentLinear()
        self.num_parameters += stack.total * stack.columns
        parts = part_shapes(format, stack.total, stack.columns, stack.gated).values()
        self.num_bytes += sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)
        return AbsentLinear()

    def _stored(self, stack: Stack) -> None:
        """Count weights that stay as they are, or become numbers of the compute dtype."""
        pieces = stored_pieces(self._reader, stack, self._linears, None)
        kinds = self._reader.kinds(stack)
        for piece in pieces or [Piece(0, len(stack.names), ())]:
            as_numbers = not piece.blocks
            for place in range(piece.first, piece.end):
                count = stack.rows[place] * stack.columns
                if as_numbers:
                    self._count(count, self._dtype)
                    kept_as = str(self._dtype).removeprefix("torch.")
                else:
                    blocks = piece.blocks[place - piece.first]
                    self.num_parameters += count
                    self.num_bytes += blocks.num_bytes
                    kept_as = blocks.layout.name
                self.kept[kinds[place], kept_as] += count
