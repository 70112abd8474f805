"""Weights of 8-bit floating-point numbers with scales."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headrace.weights.stored_formats import StoredWeight
from headrace.weights.stored_formats.integers import matrix_shape
from headrace.weights.stored_formats.scales import count_blocks, read_scales, spread_blocks
from headrace.weights.tensor_files import TensorFiles

FLOAT8 = "F8_E4M3"
"""Their element type, by safetensors' name."""


class Float8Weight(StoredWeight):
    """A weight ``[out, in]`` that is stored as ``F8_E4M3``, to be multiplied with its scales.

    Args:
        scales: name of the tensor ``[ceil(out / block rows), ceil(in / block columns)]``; a single
            scale may have fewer dimensions.
        block: rows and columns that share a scale; ``None``: all.
        others: tensors that belong to the weight and are not needed.
    """

    def __init__(
        self,
        files: TensorFiles,
        name: str,
        scales: str,
        block: tuple[int | None, int | None],
        others: Sequence[str] = (),
    ) -> None:
        super().__init__(files, name, [name, scales, *others])
        self._scales, self._block = scales, block

    @property
    def kind(self) -> str:
        """See ``StoredWeight``."""
        return f"{FLOAT8} with scales"

    @property
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return matrix_shape(self._files[self.name])

    def read(self, index: int | None = None) -> Tensor:
        """See ``StoredWeight``."""
        rows, columns = shape = self.shape
        block = self._block[0] or rows, self._block[1] or columns
        grid = count_blocks(rows, block[0]), count_blocks(columns, block[1])
        weight = self._files.load(self.name, shape, (FLOAT8,)).float()
        weight *= spread_blocks(read_scales(self._files, self._scales, grid), block, shape)
        return weight if index is None else weight[index]
