"""Arguments for every operation that is a function of tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]

ROWS = (1, 2, 17, 257)
TOLERANCES = {
    # Sums in another order differ by a few units in the last place of their largest term; one
    # more rounding to bfloat16 by one unit.
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
}


def normal(*shape: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    return (torch.randn(shape) * spread).to(dtype)


def rms_norm_cases(dtype: torch.dtype) -> Iterator[Arguments]:
    for rows, width in itertools.product((*ROWS, 4_096), (1, 31, 64, 96)):
        weight = normal(width, dtype=dtype)
        yield normal(rows, width, dtype=dtype), weight, 1e-5
        yield normal(rows, width, dtype=dtype, spread=1e-4), weight, 0.05
    heads = normal(5, 11, 24, dtype=dtype, spread=100.0)
    for part in (heads, heads[:, 3:7]):
        yield part, normal(24, dtype=dtype), 1e-6
    yield torch.zeros(3, 40, dtype=dtype), normal(40, dtype=dtype), 1e-6


def silu_and_mul_cases(dtype: torch.dtype) -> Iterator[Arguments]:
    for rows, width in itertools.product((*ROWS, 4_096), (1, 37, 112)):
        yield (normal(rows, 2 * width, dtype=dtype, spread=3.0),)
    yield (torch.tensor([[-1e4, 1e4, 0.0, 2.0, 2.0, 2.0]], dtype=dtype),)


FUNCTION_CASES: dict[str, Callable[[torch.dtype], Iterator[Arguments]]] = {
    "rms_norm": rms_norm_cases,
    "silu_and_mul": silu_and_mul_cases,
}
