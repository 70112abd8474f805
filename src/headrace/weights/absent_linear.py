"""A linear weight that is known and not in memory."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from headrace.ops.linear import Linear


class AbsentLinear(Linear):
    """Stands in a model for a weight that was only counted, or went into a file.

    Args:
        reason: why it is not in memory.
    """

    num_bytes = 0

    def __init__(self, reason: str = "the model was built to look at its shape") -> None:
        self._reason = reason

    def _fail(self) -> NoReturn:
        raise RuntimeError(f"the weight is not in memory: {self._reason}")

    def __call__(self, x: Tensor, **around: object) -> NoReturn:
        self._fail()

    def ungated(self, x: Tensor, **around: object) -> NoReturn:
        self._fail()

    def rows(self, ids: Tensor) -> NoReturn:
        self._fail()
