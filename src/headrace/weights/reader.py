"""Reads a checkpoint's tensors in the groups that models ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.contracts.load_map import LoadMap
from headrace.disk import FilePlace
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.stored_blocks import StoredBlocks

Progress = Callable[[int], None]
"""Called with the number of bytes that were just read."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Weights ``names[i] + ".weight"``, ``[rows[i], columns]``, that make one product.

    Args:
        bias: whether each has ``name + ".bias"``, ``[rows[i]]``, too.
        gated: whether the first half of all rows is a gate, and the second what it gates.
        order: for each row of the product, the row of the stack that it is; all in their order if
            ``None``.
    """

    names: Sequence[str]
    rows: Sequence[int]
    columns: int
    bias: bool = False
    gated: bool = False
    order: Sequence[int] | None = None

    def part(self, first: int, end: int) -> Stack:
        """Some of the weights, without a gate and in their order."""
        return Stack(self.names[first:end], self.rows[first:end], self.columns, self.bias)

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
    """A checkpoint's tensors by the names that a model asks for.

    Args:
        load_map: where they are stored.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        load_map: LoadMap,
        progress: Progress | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._load_map = load_map
        self._progress = progress

    def __contains__(self, name: str) -> bool:
        return self._load_map.find(name).name in self._checkpoint

    def view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One tensor where its file is mapped. Raises CheckpointError."""
        return self._counted(self._checkpoint.view(name, shape, dtype))

    def place(self, name: str) -> FilePlace | None:
        """Where a tensor lies that is stored under this name, if that is known."""
        return self._checkpoint.place(name)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in memory of its own. Raises CheckpointError."""
        part = self._load_map.find(name)
        if part.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        tensor = self._counted(self._checkpoint.read(part.name, shape, part.index))
        return tensor.transpose(-1, -2).contiguous() if part.transposed else tensor

    def _counted(self, tensor: Tensor) -> Tensor:
        self.count(tensor.nbytes)
        return tensor

    def count(self, num_bytes: int) -> None:
        """Say that so many bytes more have been read, and that they are not needed any more."""
        if self._progress:
            self._progress(num_bytes)
        self._checkpoint.release()

    def kinds(self, stack: Stack) -> list[str]:
        """What each weight of a stack is stored as, for people."""
        parts = [self._load_map.find(f"{name}.weight") for name in stack.names]
        return [self._checkpoint.kind(part.name, part.index) for part in parts]

    def blocks(self, stack: Stack) -> list[StoredBlocks | None]:
        """Each weight of a stack as integers that a native layout has; ``None`` of others."""
        found = []
        for name, rows in zip(stack.names, stack.rows, strict=True):
            part = self._load_map.find(f"{name}.weight")
            blocks = self._checkpoint.blocks(part.name, part.index)
            fits = blocks is not None and blocks.transposed == part.transposed
            shaped = blocks is not None and (blocks.rows, blocks.columns) == (rows, stack.columns)
            # One of another shape is refused when it is read.
            found.append(blocks if fits and shaped else None)
        return found

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
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if stack.order is None else whole[torch.tensor(stack.order)]
