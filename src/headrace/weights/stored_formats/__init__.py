"""Weights that checkpoints hold quantized: one file for each ``quant_method`` that is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from headrace.registry import Registry
from headrace.weights.stored_blocks import StoredBlocks
from headrace.weights.tensor_files import TensorFiles

STORED_FORMATS = Registry(
    "stored format",
    {
        "awq": "headrace.weights.stored_formats.awq:find_weights",
        "compressed-tensors": "headrace.weights.stored_formats.compressed_tensors:find_weights",
        "fp8": "headrace.weights.stored_formats.fp8:find_weights",
        "gptq": "headrace.weights.stored_formats.gptq:find_weights",
        "mxfp4": "headrace.weights.stored_formats.mxfp4:find_weights",
    },
)
"""``quant_method`` -> a ``WeightFinder``."""


@dataclass(frozen=True, slots=True)
class StoredQuantized:
    """A weight of integers as a checkpoint has them: they stand for ``scale * (value - zero)``.

    G is the number of groups, of which the last may be cut off.

    Args:
        values: uint8 ``[out, in]``, columns in the model's order.
        scales: fp32 ``[out, G]``.
        zeros: uint8 ``[out, G]``; ``None``: each is ``2 ** (bits - 1)``.
        bits: of a value, 4 or 8.
        group: columns that share a scale; ``in`` if all of a row do.
        order: int64 ``[in]``, the columns group by group: column ``order[i]`` is in group
            ``i // group``; ``None``: column ``i`` is.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    order: Tensor | None = None

    def dequantize(self) -> Tensor:
        """fp32 ``[out, in]``."""
        columns, order = self.values.shape[1], self.order
        values = self.values if order is None else self.values[:, order]
        padded = F.pad(values, (0, -columns % self.group)).float()
        groups = padded.view(len(padded), -1, self.group)
        groups -= 1 << (self.bits - 1) if self.zeros is None else self.zeros.unsqueeze(-1)
        groups *= self.scales.unsqueeze(-1)
        weight = groups.flatten(1)[:, :columns].contiguous()
        return weight if order is None else weight[:, order.argsort()]


class StoredWeight(ABC):
    """A weight that is stored quantized, and what it is in the unquantized checkpoint.

    Args:
        files: of the checkpoint.
        name: in the unquantized checkpoint.
        parts: names of the tensors that are stored for it, of which the first has its values;
            those that are not there are left out.
    """

    def __init__(self, files: TensorFiles, name: str, parts: Sequence[str]) -> None:
        self.name = name
        self.parts = tuple(part for part in parts if part in files)
        self._files = files

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is stored as, for people."""

    @property
    def description(self) -> str:
        """For error messages."""
        values = self._files[self.parts[0]]
        return f"{values.path}: weight {self.name!r}, stored as {values.name!r},"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """In the unquantized checkpoint. Raises CheckpointError: what is stored has no such."""

    @abstractmethod
    def read(self, index: int | None = None) -> Tensor:
        """The weight, or the part ``index`` of its first dimension, in fp32.

        Raises:
            CheckpointError: a tensor is missing, or has another shape or element type than
                config.json asks for.
        """

    def blocks(self, index: int | None = None) -> StoredBlocks | None:
        """It, or the part ``index`` of its first dimension, as integers that a native layout has.

        Raises:
            CheckpointError: see ``read``.
        """
        return None


WeightFinder = Callable[[Mapping[str, Any], TensorFiles], dict[str, StoredWeight]]
"""From ``quantization_config`` and the files to the weights that are stored quantized, by name.

It raises CheckpointError where it does not read the variant that ``quantization_config`` states.
"""


def stored_method(config: Mapping[str, Any]) -> str | None:
    """The name among ``STORED_FORMATS`` that a ``config.json`` states, if it states one."""
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    return method if isinstance(method, str) and method in STORED_FORMATS else None


def find_stored_weights(config: Mapping[str, Any], files: TensorFiles) -> dict[str, StoredWeight]:
    """The weights that are stored in one of ``STORED_FORMATS``, by name.

    Raises:
        CheckpointError: the variant of the format is not read.
    """
    method = stored_method(config)
    if method is None:
        return {}
    find: WeightFinder = STORED_FORMATS.resolve(method)
    return find(config["quantization_config"], files)
