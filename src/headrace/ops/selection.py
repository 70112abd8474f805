"""Searches in wide rows: the likeliest tokens, the strongest neurons."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from headrace.ops import _native

BLOCK = 64
"""Rows that are searched are padded to a multiple of this."""

_DIGITS = ((31, 21), (21, 11), (11, 0))
"""Bits of a positive float, most significant first, as (end, start)."""
_BINS = 1 << 11


def highest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score ``[R, 1]``, NaN where the row has one, and its first place ``[R]``.

    ``scores`` is fp32 ``[R, width]``, ``width`` a multiple of ``BLOCK``.
    """
    blocks = scores.view(len(scores), -1, BLOCK)
    values, block = blocks.amax(dim=-1).max(dim=-1)
    inside = blocks[torch.arange(len(scores), device=scores.device), block]
    return values.unsqueeze(1), block * BLOCK + inside.argmax(dim=-1)


def lowest_kept(scores: Tensor, measures: Tensor, wanted: Tensor) -> Tensor:
    """``[R, 1]``: the lowest score of the smallest upper set that measures at least ``wanted``.

    Scores are at most 0 and ``measures``, of each place, at least 0, both ``[R, width]``. Where the
    whole row measures less, it is the row's lowest score. Radix selection over the scores' bits.
    """
    keys = scores.abs().view(torch.int32)
    prefix = torch.zeros_like(keys[:, :1])
    above = torch.zeros_like(wanted, dtype=torch.float64)
    for end, start in _DIGITS:
        digits = (keys >> start) & ((1 << (end - start)) - 1)
        inside = torch.where(keys >> end == prefix, measures, 0).double()
        histogram = torch.zeros(len(keys), _BINS, dtype=torch.float64, device=keys.device)
        sums = above + histogram.scatter_add_(1, digits.long(), inside).cumsum(dim=-1)
        place = (sums < torch.minimum(wanted, sums[:, -1:])).sum(dim=-1, keepdim=True)
        above = torch.cat((above, sums), dim=-1).gather(1, place)
        prefix = (prefix << (end - start)) | place.int()
    return -prefix.view(torch.float32)


def strongest(values: Tensor, share: float) -> Tensor:
    """``[R, 1]``: the lowest of the ``share`` of each row's positive values that are the highest.

    Infinity where none is positive. ``share`` is above 0 and at most 1, ``values`` ``[R, width]``.
    """
    counts = (values > 0).sum(1, keepdim=True)
    sizes = (counts.double() * share).ceil().long()
    most = max(1, int(sizes.max()))
    places = (sizes - 1).clamp_min(0)
    return values.topk(most, dim=1).values.gather(1, places).masked_fill(sizes == 0, torch.inf)


def partitioned_strongest(values: Tensor, share: float) -> Tensor:
    """``strongest`` on a CPU: rows are divided at the value that is sought, and not sorted."""
    found = np.full((len(values), 1), np.inf, np.float32)
    for place, row in enumerate(values.float().numpy()):
        size = math.ceil(np.count_nonzero(row > 0) * share)
        if size > 0:
            found[place] = np.partition(row, -size)[-size]
    return torch.from_numpy(found).to(values.dtype)


@dataclass(frozen=True, slots=True)
class Selection:
    """The three searches, with the signatures of the functions after which they are named."""

    highest: Callable[[Tensor], tuple[Tensor, Tensor]] = highest
    lowest_kept: Callable[[Tensor, Tensor, Tensor], Tensor] = lowest_kept
    strongest: Callable[[Tensor, float], Tensor] = strongest


def native_highest(context: _native.Context, scores: Tensor) -> tuple[Tensor, Tensor]:
    """``highest`` on the native kernels, pieces of rows on all threads."""
    scores = scores.contiguous()
    values, places = torch.empty(len(scores), 1), torch.empty(len(scores), dtype=torch.int64)
    rows, width = scores.shape
    context.highest(scores.data_ptr(), rows, width, values.data_ptr(), places.data_ptr())
    return values, places


def native_lowest_kept(
    context: _native.Context, scores: Tensor, measures: Tensor, wanted: Tensor
) -> Tensor:
    """``lowest_kept`` on the native kernels, a row on each thread; all fp32 but ``wanted``."""
    scores, measures = scores.contiguous(), measures.float().contiguous()
    wanted = wanted.double().contiguous()
    lowest = torch.empty(len(scores), 1)
    context.lowest_kept(
        scores.data_ptr(),
        measures.data_ptr(),
        len(scores),
        scores.shape[1],
        wanted.data_ptr(),
        lowest.data_ptr(),
    )
    return lowest
