"""Rows as wide as a vocabulary, worked on in blocks: no pass keeps indices, none sorts a row.

The width is a multiple of ``BLOCK`` (see ``pad``). Every result of a row is computed from that row
alone and in the same order, however many rows there are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.selection import BLOCK


def pad(scores: Tensor) -> Tensor:
    """``scores`` with columns of -inf up to a whole number of blocks."""
    missing = -scores.shape[1] % BLOCK
    return F.pad(scores, (0, missing), value=-math.inf) if missing else scores


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of ``x``, in order; ``x`` itself when that is all of them."""
    return x if len(rows) == len(x) else x[rows]


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest scores in descending order and their places, both ``[R, count]``.

    They lie in the ``count`` blocks with the largest maxima.
    """
    blocks = scores.view(len(scores), -1, BLOCK)
    if blocks.shape[1] <= count:
        values, places = scores.topk(min(count, scores.shape[1]), dim=-1)
        return values, places
    best = blocks.amax(dim=-1).topk(count, dim=-1, sorted=False).indices
    rows = torch.arange(len(scores), device=scores.device).unsqueeze(1)
    values, places = blocks[rows, best].flatten(1).topk(count, dim=-1)
    return values, best.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def total(weights: Tensor) -> Tensor:
    """``[R, 1]``: the sum of each row, in fp64."""
    blocks = weights.view(len(weights), -1, BLOCK)
    return blocks.sum(dim=-1).sum(dim=-1, keepdim=True, dtype=torch.float64)


def locate(weights: Tensor, numbers: Tensor) -> Tensor:
    """``[R]``: the first place at which the running sum of a row exceeds ``number`` of its total.

    Places of zero weight are never met. ``numbers`` is ``[R]``, in [0, 1).
    """
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = numbers.unsqueeze(1) * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True)
    before = F.pad(sums, (1, 0)).gather(1, block)
    rows = torch.arange(len(weights), device=weights.device).unsqueeze(1)
    inside = blocks[rows, block].squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    # The block was summed in another order; what is left of the target must stay below its end.
    left = torch.minimum(target - before, inside[:, -1:] * (1 - 2**-50))
    return (block * BLOCK + torch.searchsorted(inside, left, right=True)).squeeze(1)
