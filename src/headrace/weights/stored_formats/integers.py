"""Weights of integers that are packed into words."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.ops.block_weight import BlockLayout, BlockParts, Take
from headrace.weights.stored_blocks import StoredBlocks
from headrace.weights.stored_formats import StoredQuantized, StoredWeight
from headrace.weights.tensor_files import StoredTensor, TensorFiles

WORD_BITS = 32
_GROUPS = (256, 128, 64, 32)
"""Columns that a native layout can have share a scale, the most first."""
_FACTORS = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Element types of scales that it has, by safetensors' names."""


class IntegerWeight(StoredWeight):
    """A weight ``[out, in]`` that is made of integers.

    Args:
        scales: the tensor that has them.
        bits: of a value.
        group: columns that share a scale; ``None``: all of a row.
        symmetric: whether there are certainly no zeros but that in the middle.
    """

    def __init__(
        self,
        files: TensorFiles,
        name: str,
        parts: Sequence[str],
        scales: str,
        bits: int,
        group: int | None,
        symmetric: bool,
    ) -> None:
        super().__init__(files, name, parts)
        self._scales, self._bits, self._group = scales, bits, group
        self._symmetric = symmetric

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``[out, in]``. Raises CheckpointError: what is stored has no such."""

    @property
    def kind(self) -> str:
        """See ``StoredWeight``."""
        group = "rows" if self._group is None else f"groups of {self._group}"
        return f"integers of {self._bits} bits in {group}"

    def order(self) -> Tensor | None:
        """See ``StoredQuantized``. Raises CheckpointError as ``read`` does."""
        return None

    def blocks(self, index: int | None = None) -> StoredBlocks | None:
        """See ``StoredWeight``: its scales must be of 16 bits, and its groups not odd."""
        rows, columns = self.shape
        group = self._group or columns
        size = next((size for size in _GROUPS if group % size == 0), None)
        dtype = _FACTORS.get(self._files[self._scales].dtype)
        if index is not None or size is None or dtype is None:
            return None
        layout = BlockLayout(self._bits, size, 1 << (self._bits - 1), group // size)

        def open_rows() -> Take:
            parts = self._parts(layout, dtype)
            return lambda ids: parts.map(lambda x: x[ids])

        bits = self._bits + 16 / group + (0 if self._symmetric else 8 / size)
        return StoredBlocks(layout, bits, rows, columns, open_rows, order=self.order())

    def _parts(self, layout: BlockLayout, dtype: torch.dtype) -> BlockParts:
        """All of it, its columns group by group."""
        weight = self.quantized()
        values = weight.values if weight.order is None else weight.values[:, weight.order]
        zeros = weight.zeros
        if zeros is not None:
            groups = -(-values.shape[1] // layout.group)
            zeros = zeros.repeat_interleave(layout.super, 1)[:, :groups]
        return BlockParts(values, weight.scales.to(dtype), zeros=zeros)

    def read(self, index: int | None = None) -> Tensor:
        """See ``StoredWeight``."""
        weight = self.quantized().dequantize()
        return weight if index is None else weight[index]

    @abstractmethod
    def quantized(self) -> StoredQuantized:
        """Its integers. Raises CheckpointError as ``read`` does."""


def matrix_shape(tensor: StoredTensor) -> tuple[int, int]:
    """Its two dimensions. Raises CheckpointError: there are more, or fewer."""
    if len(tensor.shape) != 2:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but "
            "config.json asks for two dimensions; they do not belong together"
        )
    return tensor.shape[0], tensor.shape[1]


def in_turn(bits: int) -> range:
    """Shifts of the values in a word that begins with the first of them, in its lowest bits."""
    return range(0, WORD_BITS, bits)


def count_words(values: int, bits: int) -> int:
    """Words that hold so many values, the last one not always full."""
    return -(-values * bits // WORD_BITS)


def unpack(words: Tensor, shifts: Sequence[int], bits: int) -> Tensor:
    """The values in words.

    Args:
        words: of any integer type, of which the low 32 bits count, ``[..., W]``.
        shifts: for each value of a word, its lowest bit there.

    Returns:
        uint8 ``[..., W * len(shifts)]``.
    """
    values = torch.empty(*words.shape, len(shifts), dtype=torch.uint8)
    for place, shift in enumerate(shifts):
        values[..., place] = (words >> shift) & ((1 << bits) - 1)
    return values.flatten(-2)


def read_order(files: TensorFiles, name: str, columns: int, group: int) -> Tensor | None:
    """Columns group by group, from a tensor that has the group of each column.

    Returns:
        int64 ``[columns]``; ``None`` if the columns are so already.

    Raises:
        CheckpointError: it is missing, or its groups are not of ``group`` columns each.
    """
    groups = files.load(name, (columns,), ("I32", "I64")).long()
    natural = torch.arange(columns) // group
    if torch.equal(groups, natural):
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], natural):
        raise CheckpointError(
            f"{files[name].path}: tensor {name!r} does not put every column into one of "
            f"{int(natural[-1]) + 1} groups of {group}, as config.json asks for; they do not "
            "belong together"
        )
    return order
