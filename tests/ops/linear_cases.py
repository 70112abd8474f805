"""Weights and calls for every version of the linear operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.ops.linear import Linear, LinearOps, RMSNorm
from headrace.ops.packed_weight import (
    FORMATS,
    PackedWeight,
    QuantizedWeight,
    WeightFormat,
    pack,
    pack_dense,
)

SIZES = ((1, 1), (2, 33), (16, 32), (40, 129), (100, 320), (258, 200), (48, 600))
"""Rows and columns; both even and odd numbers of panels, groups cut off, columns padded."""

TOKENS = (1, 2, 3, 17, 64, 200)


def random_quantized(rows: int, columns: int, format: WeightFormat) -> QuantizedWeight:
    """Any values, scales of both signs and zero points that a format can hold."""
    lowest = 1 if format.bits == 8 else 0
    values = torch.randint(lowest, 1 << format.bits, (rows, columns), dtype=torch.uint8)
    groups = -(-columns // (format.group or columns))
    scales = torch.randn(rows, groups) / (columns * 4.0**format.bits) ** 0.5
    if format.group is not None:
        scales = scales.bfloat16().float()
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8)
    return QuantizedWeight(values, scales, zeros if format.zero_points else None)


def random_packed(rows: int, columns: int, format: WeightFormat, gated: bool) -> PackedWeight:
    """A random weight in the packed layout."""
    if format.bits == 16:
        return pack_dense(torch.randn(rows, columns) / columns**0.5, gated)
    return pack(random_quantized(rows, columns, format), format, gated)


@dataclass(frozen=True)
class LinearCase:
    """One weight, ``None`` for an unpacked one, and what surrounds its products."""

    format: WeightFormat | None
    rows: int
    columns: int
    gated: bool
    bias: bool

    def __str__(self) -> str:
        marks = ("-gated" if self.gated else "") + ("-bias" if self.bias else "")
        name = "dense" if self.format is None else self.format.name
        return f"{name}-{self.rows}x{self.columns}{marks}"

    def linear(self, ops: LinearOps, dtype: torch.dtype) -> Linear:
        """The same weight for every call with the same arguments."""
        torch.manual_seed(self.rows)
        bias = torch.randn(self.rows).to(dtype) if self.bias else None
        if self.format is None:
            weight = (torch.randn(self.rows, self.columns) / self.columns**0.5).to(dtype)
            return ops.dense(weight, bias, gated=self.gated)
        return ops.packed(random_packed(self.rows, self.columns, self.format, self.gated), bias)

    def calls(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Inputs and options, each combination of which occurs with some number of tokens."""
        width = self.rows // 2 if self.gated else self.rows
        norm = RMSNorm(torch.rand(self.columns).to(dtype), 1e-5)
        for tokens, with_norm, with_residual in itertools.product(TOKENS, (0, 1), (0, 1)):
            # A part of a wider tensor, as heads are parts of a projection.
            x = torch.randn(tokens, self.columns + 5).to(dtype)[:, 2:-3]
            residual = torch.randn(tokens, width).to(dtype)
            yield (
                x,
                {
                    "norm": norm if with_norm else None,
                    "residual": residual if with_residual else None,
                    "out_dtype": torch.float32 if tokens % 2 else None,
                },
            )


MakeOps = Callable[[torch.dtype], LinearOps]

CASES = [
    LinearCase(format, rows, columns, gated, bool(index % 2))
    for format in (None, *FORMATS)
    for index, (rows, columns) in enumerate(SIZES)
    for gated in ((False, True) if rows % 2 == 0 else (False,))
]
