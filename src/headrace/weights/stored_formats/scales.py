"""Scales that count for blocks of a weight."""

from __future__ import annotations

import math

from torch import Tensor

from headrace.weights.tensor_files import TensorFiles

FLOATS = ("F32", "BF16", "F16")
"""Element types that scales may have, by safetensors' names."""


def count_blocks(size: int, block: int) -> int:
    """Blocks that cover ``size`` rows or columns, the last one cut off."""
    return -(-size // block)


def single_shape(files: TensorFiles, name: str) -> tuple[int, ...]:
    """The shape of a tensor that has one element: formats differ in whether it has dimensions.

    It is ``[1]`` where the tensor has other than one element, for reading it to fail.
    """
    shape = files[name].shape
    return shape if math.prod(shape) == 1 else (1,)


def read_scales(files: TensorFiles, name: str, grid: tuple[int, int]) -> Tensor:
    """Scales for ``grid`` blocks of a weight, rows and columns of them, in fp32.

    Raises:
        CheckpointError: they are missing, or have another shape or element type.
    """
    shape = single_shape(files, name) if grid == (1, 1) else grid
    return files.load(name, shape, FLOATS).float().view(grid)


def spread_blocks(x: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Entries for blocks -> what broadcasts to entries for the ``shape`` of the weight.

    Args:
        x: ``[ceil(rows / block rows), ceil(columns / block columns)]``.
    """
    for dimension, (size, total) in enumerate(zip(block, shape, strict=True)):
        if size < total:
            x = x.repeat_interleave(size, dimension).narrow(dimension, 0, total)
    return x
