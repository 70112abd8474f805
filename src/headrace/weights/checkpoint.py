"""What every kind of checkpoint offers: a configuration, and tensors by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.disk import FilePlace
from headrace.weights.stored_blocks import StoredBlocks


class Checkpoint(ABC):
    """Tensors by the names that a Hugging Face checkpoint of the architecture gives them.

    Attributes:
        directory: where it lies, or the file's.
        config: as in ``config.json``.
    """

    directory: Path
    config: dict[str, Any]

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """The names."""

    @abstractmethod
    def read(self, name: str, shape: tuple[int, ...], index: int | None = None) -> Tensor:
        """A tensor in memory of its own, in a floating-point type.

        Args:
            index: of its first dimension, if only that part is meant; ``shape`` is the part's.

        Raises:
            CheckpointError: it is missing, damaged, or has another shape.
        """

    @abstractmethod
    def view(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        index: int | None = None,
    ) -> Tensor:
        """A tensor where its file is mapped.

        Raises:
            CheckpointError: it is missing, or has another shape or dtype than is asked for.
        """

    def place(self, name: str) -> FilePlace | None:
        """Where the bytes of a tensor lie; ``None`` if it is made of others as it is read.

        Raises:
            CheckpointError: it is missing.
        """
        return None

    @abstractmethod
    def kind(self, name: str, index: int | None = None) -> str:
        """What a tensor is stored as, for people. Raises CheckpointError: it is missing."""

    @abstractmethod
    def blocks(self, name: str, index: int | None = None) -> StoredBlocks | None:
        """A weight of integers that a native layout has as they are; ``None`` of other tensors.

        Args:
            index: see ``read``.

        Raises:
            CheckpointError: it is missing or damaged.
        """

    @abstractmethod
    def release(self) -> None:
        """Give up memory that reading has taken, and that the file can give again."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of all tensors as they are read."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Element type that the weights were trained in, by torch's name."""
