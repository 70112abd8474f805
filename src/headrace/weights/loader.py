"""From a checkpoint's tensors to a model's parameters, in the compute dtype and packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace.ops.table import Ops
from headrace.weights.dense import DenseLinear
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint

Progress = Callable[[int], None]
"""Called with the number of bytes that were just loaded."""


class WeightLoader:
    """The ``WeightSource`` of a safetensors checkpoint.

    Counts parameters and the bytes they take in memory as it goes.
    """

    def __init__(
        self, checkpoint: SafetensorsCheckpoint, ops: Ops, progress: Progress | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._ops = ops
        self._progress = progress
        self.num_parameters = 0
        self.num_bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def _load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """In the compute dtype on the device, in memory of its own: the file may go away."""
        stored = self._checkpoint.tensor(name, shape)
        loaded = stored.to(device=self._ops.device, dtype=self._ops.dtype, copy=True)
        self.num_parameters += loaded.numel()
        self.num_bytes += loaded.numel() * loaded.element_size()
        if self._progress:
            self._progress(stored.numel() * stored.element_size())
        return loaded

    def vector(self, name: str, size: int) -> Tensor:
        """A parameter ``[size]``."""
        return self._load(name, (size,))

    def table(self, name: str, rows: int, columns: int) -> Tensor:
        """A parameter ``[rows, columns]``."""
        return self._load(name, (rows, columns))

    def linear(
        self, names: Sequence[str], rows: Sequence[int], columns: int, *, bias: bool = False
    ) -> DenseLinear:
        """One product for the weights ``names``, stacked along their rows."""
        parts = [
            self._load(f"{name}.weight", (count, columns))
            for name, count in zip(names, rows, strict=True)
        ]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
        offsets = None
        if bias:
            offsets = torch.cat(
                [
                    self._load(f"{name}.bias", (count,))
                    for name, count in zip(names, rows, strict=True)
                ]
            )
        return DenseLinear(weight, offsets, self._ops)

    def tied_linear(self, table: Tensor) -> DenseLinear:
        """The product with ``table`` ``[rows, columns]``, which stays as it is."""
        linear = DenseLinear(table, None, self._ops)
        if linear.packed:
            self.num_bytes += table.numel() * table.element_size()
        return linear
