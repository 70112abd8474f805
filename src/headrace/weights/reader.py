"""Reads a checkpoint's tensors in the groups that models ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint

Progress = Callable[[int], None]
"""Called with the number of bytes that were just read."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Weights ``names[i] + ".weight"``, ``[rows[i], columns]``, that make one product.

    Args:
        bias: whether each has ``name + ".bias"``, ``[rows[i]]``, too.
        gated: whether they are a gate and what it gates.
    """

    names: Sequence[str]
    rows: Sequence[int]
    columns: int
    bias: bool = False
    gated: bool = False

    @property
    def name(self) -> str:
        """Of all as one: "model.layers.0.mlp.gate_proj+up_proj"."""
        return self.names[0] + "".join("+" + name.rpartition(".")[2] for name in self.names[1:])

    @property
    def total(self) -> int:
        """Rows of all."""
        return sum(self.rows)

    @property
    def num_parameters(self) -> int:
        """Of all, biases included."""
        return self.total * (self.columns + self.bias)


class WeightReader:
    """A checkpoint's tensors as they are stored."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, progress: Progress | None = None) -> None:
        self._checkpoint = checkpoint
        self._progress = progress

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One tensor where its file is mapped. Raises CheckpointError."""
        return self._counted(self._checkpoint.view(name, shape, dtype))

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in memory of its own, as it is stored. Raises CheckpointError."""
        return self._counted(self._checkpoint.read(name, shape))

    def _counted(self, tensor: Tensor) -> Tensor:
        if self._progress:
            self._progress(tensor.nbytes)
        return tensor

    def weight(self, stack: Stack) -> Tensor:
        """``[total, columns]``."""
        return self._joined("weight", stack, (stack.columns,))

    def bias(self, stack: Stack) -> Tensor | None:
        """``[total]``, if there is one."""
        return self._joined("bias", stack, ()) if stack.bias else None

    def _joined(self, kind: str, stack: Stack, width: tuple[int, ...]) -> Tensor:
        parts = [
            self.read(f"{name}.{kind}", (rows, *width))
            for name, rows in zip(stack.names, stack.rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
