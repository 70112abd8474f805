"""The scale of each group of weights that approximates it best: of the few that are tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.ops.extension import open_context
from headrace.ops.packed_weight import WeightFormat

if TYPE_CHECKING:
    from headrace.ops import _native

ScaleSearch = Callable[[Tensor, WeightFormat], tuple[Tensor, Tensor, Tensor]]
"""Groups of weights and a format to values, scales and zero points, as ``search_scales``."""

_SMALLEST = 1e-30
"""Groups whose largest magnitude is below are zero: scales stay clear of subnormal numbers."""

# Where a group's largest value falls on its grid. On one of -8..7 it falls near -8, whatever its
# sign, since scales have signs too; a little inside serves the others better, a little outside
# cuts it off.
_ENDS = {
    4: tuple(-8 + 0.15 * step for step in range(-6, 7)),
    8: (127.0, 129.0, 132.0),
}
# Steps between a group's smallest and largest value, on a grid of 15.
_SPANS = tuple(15 + 0.25 * step for step in range(-2, 7))


def search_scales(groups: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scale and zero point of each group.

    Of a few scales around the one that just covers a group, that with the least squared error. Each
    candidate's rounding is followed by the least-squares scale for it, as llama.cpp's
    ``make_qx_quants`` does; the last rounding is made with the scale as it is stored.

    Args:
        groups: fp32 ``[n, size]``.

    Returns:
        uint8 ``[n, size]``, fp32 ``[n]`` (rounded to bf16 for formats with groups), uint8 ``[n]``.
    """
    x = groups.t().contiguous()  # sums over a group are then sums of whole rows
    lowest, highest = _grid(format)
    if format.zero_points:
        low = x.amin(0).clamp_(max=0)
        base, ends = x.amax(0).clamp_(min=0) - low, _SPANS
    else:
        base, ends = x.gather(0, x.abs().argmax(0, keepdim=True))[0], _ENDS[format.bits]
    base = torch.where(base.abs() < _SMALLEST, 1.0, base)
    # A group that is not finite has no best candidate, and keeps a scale that is no number.
    scale, best = torch.full_like(base, math.nan), torch.full_like(base, -1.0)
    zero = middle = torch.full_like(base, format.zero)
    for end in ends:
        inverse = end / base
        if format.zero_points:
            middle = (-low * inverse).round_().clamp_(lowest, highest)
        grid = (x * inverse).round_().clamp_(lowest - middle, highest - middle)
        product, norm = (grid * x).sum(0), grid.square_().sum(0).clamp_(min=_SMALLEST)
        gain = product.square() / norm  # how far the squared error falls from that of all zeros
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, product / norm, scale)
        zero = torch.where(better, middle, zero)
    if format.group is not None:
        scale = scale.bfloat16().float()
    scale = torch.where(scale.abs() < _SMALLEST, 0.0, scale)
    values = (x / torch.where(scale == 0, 1.0, scale)).round_().add_(zero)
    values = values.clamp_(lowest, highest).to(torch.uint8)
    return values.t().contiguous(), scale, zero.to(torch.uint8)


def native_search_scales(
    context: _native.Context, groups: Tensor, format: WeightFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """``search_scales`` on the native kernels; sums go in another order."""
    groups = groups.float().contiguous()
    count, size = groups.shape
    values = torch.empty(count, size, dtype=torch.uint8)
    scales = torch.empty(count)
    zeros = torch.full((count,), format.zero, dtype=torch.uint8)
    context.search_scales(
        groups.data_ptr(),
        count,
        size,
        _SPANS if format.zero_points else _ENDS[format.bits],
        *_grid(format),
        format.zero,
        format.group is not None,
        values.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr() if format.zero_points else 0,
    )
    return values, scales, zeros


def make_scale_search(threads: int) -> ScaleSearch:
    """The fastest of this installation, on so many threads.

    It does not depend on what the model computes with: a weight is quantized alike everywhere.
    """
    context = open_context("auto", threads)
    return search_scales if context is None else partial(native_search_scales, context)


def _grid(format: WeightFormat) -> tuple[int, int]:
    """The lowest and the highest value."""
    return (1, 255) if format.bits == 8 else (0, 15)
