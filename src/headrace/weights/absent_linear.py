"""A linear weight that is known and not in memory."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from headrace.ops.linear import Linear


class AbsentLinear(Linear):
    """Stands in a model for a weight that was only counted, or went into a file."""

    num_bytes = 0

    def __call__(self, x: Tensor, **around: object) -> NoReturn:
        raise RuntimeError("the weight is not in memory: the model was built to look at its shape")

    def ungated(self, x: Tensor, **around: object) -> NoReturn:
        raise RuntimeError("the weight is not in memory: the model was built to look at its shape")

    def rows(self, ids: Tensor) -> NoReturn:
        raise RuntimeError("the weight is not in memory: the model was built to look at its shape")
