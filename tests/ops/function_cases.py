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


def linear_cases(dtype: torch.dtype) -> Iterator[Arguments]:
    sizes = ((1, 1), (5, 3), (64, 64), (33, 257), (320, 96), (1_000, 128))
    for rows, (inputs, outputs) in itertools.product(ROWS, sizes):
        weight = normal(outputs, inputs, dtype=dtype, spread=inputs**-0.5)
        yield normal(rows, inputs, dtype=dtype), weight, None
        yield normal(rows, inputs, dtype=dtype), weight, normal(outputs, dtype=dtype)
    yield normal(4_096, 65, dtype=dtype), normal(31, 65, dtype=dtype, spread=0.1), None
    # A part of a wider tensor, as heads are parts of a projection.
    wide = normal(9, 200, dtype=dtype)
    yield wide[:, 7:71], normal(12, 64, dtype=dtype, spread=0.1), normal(12, dtype=dtype)


def embedding_cases(dtype: torch.dtype) -> Iterator[Arguments]:
    for rows, width in itertools.product((*ROWS, 4_096), (1, 48, 77)):
        yield torch.randint(0, 501, (rows,)), normal(501, width, dtype=dtype)


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


def rotate_cases(dtype: torch.dtype) -> Iterator[Arguments]:
    for rows, (heads, width) in itertools.product(ROWS, ((1, 2), (7, 24), (32, 64), (2, 256))):
        angles = torch.rand(rows, width // 2) * 1_000
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        joined = normal(rows, heads + 3, width, dtype=dtype)
        yield joined[:, :heads], cos, sin


FUNCTION_CASES: dict[str, Callable[[torch.dtype], Iterator[Arguments]]] = {
    "linear": linear_cases,
    "embedding": embedding_cases,
    "rms_norm": rms_norm_cases,
    "silu_and_mul": silu_and_mul_cases,
    "rotate": rotate_cases,
}
