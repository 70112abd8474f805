"""Round to nearest, on a grid whose scale is searched: no data is needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.packed_weight import QuantizedWeight, WeightFormat
from headrace.ops.scale_search import ScaleSearch
from headrace.weights.quantizers import Quantizer

_AT_ONCE = 1 << 18
"""Weights that are searched together: enough to keep threads busy, few enough for the caches."""


class RoundToNearest(Quantizer):
    """Of a few scales around the one that just covers a group, that with the least squared error.

    Args:
        search: finds it; see ``headrace.ops.scale_search``.
    """

    def __init__(self, search: ScaleSearch) -> None:
        self._search = search

    def quantize(self, weight: Tensor, format: WeightFormat) -> QuantizedWeight:
        rows, columns = weight.shape
        size = format.group or columns
        groups = -(-columns // size)
        values = torch.empty(rows, groups, size, dtype=torch.uint8)
        scales = torch.empty(rows, groups)
        zeros = torch.empty(rows, groups, dtype=torch.uint8)
        step = max(1, _AT_ONCE // columns)
        for part in (slice(start, start + step) for start in range(0, rows, step)):
            padded = F.pad(weight[part].float(), (0, -columns % size))
            found = self._search(padded.view(-1, size), format)
            for target, source in zip((values, scales, zeros), found, strict=True):
                target[part] = source.view_as(target[part])
        return QuantizedWeight(
            values.flatten(1)[:, :columns], scales, zeros if format.zero_points else None
        )
