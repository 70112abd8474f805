"""``quant_method`` "mxfp4": the experts of gpt-oss, in 4-bit floating-point numbers.

"OCP Microscaling Formats (MX) Specification", version 1.0: 32 values of type E2M1 share a scale of
type E8M0. A tensor ``name`` of experts is stored as ``name_blocks``, uint8 ``[experts, rows, G,
16]`` with the first of two values in the low half of a byte, and ``name_scales``, uint8 ``[experts,
rows, G]``: here the columns of a row follow one another, while the unquantized checkpoint has
``[experts, columns, rows]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.ops.block_weight import FP4, BlockLayout, BlockParts, Take
from headrace.weights.stored_blocks import StoredBlocks
from headrace.weights.stored_formats import StoredWeight
from headrace.weights.tensor_files import TensorFiles

_BLOCKS = "_blocks"
_BYTES = 16
_LAYOUT = BlockLayout(4, 2 * _BYTES, table=FP4)
_BITS = 4 + 16 / (2 * _BYTES)
"""Of a weight in that layout."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the eight numbers of type E2M1 without a sign, which is the highest bit."""


class Mxfp4Experts(StoredWeight):
    """The weights of all experts of a layer."""

    def __init__(self, files: TensorFiles, name: str) -> None:
        super().__init__(files, name, [f"{name}{_BLOCKS}", f"{name}_scales"])

    @property
    def _stored_shape(self) -> tuple[int, int, int]:
        """Experts, rows and groups."""
        blocks = self._files[f"{self.name}{_BLOCKS}"]
        if len(blocks.shape) != 4 or blocks.shape[3] != _BYTES:
            raise CheckpointError(
                f"{blocks.path}: tensor {blocks.name!r} has shape {list(blocks.shape)}, but "
                f"config.json asks for [experts, rows, groups, {_BYTES}]; they do not belong "
                "together"
            )
        experts, rows, groups, _ = blocks.shape
        return experts, rows, groups

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[experts, columns, rows]``."""
        experts, rows, groups = self._stored_shape
        return experts, groups * 2 * _BYTES, rows

    @property
    def kind(self) -> str:
        """See ``StoredWeight``."""
        return "MXFP4"

    def blocks(self, index: int | None = None) -> StoredBlocks | None:
        """See ``StoredWeight``: one expert's, whose rows are the columns of ``read``."""
        _, rows, groups = self._stored_shape
        if index is None:
            return None

        def open_rows() -> Take:
            stored, scales = self._load(index)
            values = torch.stack((stored & 15, stored >> 4), -1).view(rows, -1)
            # The table has twice the values of the type.
            factors = scales.view(torch.float8_e8m0fnu).float() / 2
            parts = BlockParts(values, factors.bfloat16())
            return lambda ids: parts.map(lambda x: x[ids])

        columns = groups * 2 * _BYTES
        return StoredBlocks(_LAYOUT, _BITS, rows, columns, open_rows, transposed=True)

    def _load(self, index: int | None) -> tuple[Tensor, Tensor]:
        """Values and scales as they are stored."""
        shape = self._stored_shape if index is None else self._stored_shape[1:]
        blocks = self._files.load(f"{self.name}{_BLOCKS}", (*shape, _BYTES), ("U8",), index)
        return blocks, self._files.load(f"{self.name}_scales", shape, ("U8",), index)

    def read(self, index: int | None = None) -> Tensor:
        """See ``StoredWeight``; of one expert, no more than that is read."""
        blocks, scales = self._load(index)
        values = F.embedding(blocks.int(), _pairs()).flatten(-2)
        values *= scales.view(torch.float8_e8m0fnu).float().unsqueeze(-1)
        return values.flatten(-2).transpose(-1, -2)


def _pairs() -> Tensor:
    """The two numbers in each byte, fp32 ``[256, 2]``."""
    numbers = torch.tensor([sign * size for sign in (1.0, -1.0) for size in _MAGNITUDES])
    byte = torch.arange(256)
    return torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=1)


def find_weights(section: Mapping[str, Any], files: TensorFiles) -> dict[str, StoredWeight]:
    """See ``WeightFinder``. Modules that are not to be converted are stored plainly."""
    names = [name.removesuffix(_BLOCKS) for name in files if name.endswith(_BLOCKS)]
    return {name: Mxfp4Experts(files, name) for name in names}
