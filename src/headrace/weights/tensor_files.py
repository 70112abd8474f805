"""Safetensors files as they are: their tensors by name, and reading them into memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is, and what its file's header says of it.

    Args:
        path, file: its file, and the same opened by safetensors.
        offset, num_bytes: of its data in the file.
        dtype: element type by safetensors' name.
    """

    name: str
    path: Path
    file: Any
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]

    def check_shape(self, shape: tuple[int, ...], index: int | None = None) -> None:
        """Raise a CheckpointError unless it, or its part ``index``, has ``shape``."""
        check_shape(f"{self.path}: tensor {self.name!r}", self.shape, shape, index)

    def mapped(self) -> Tensor:
        """A view of the mapped file, in the stored element type."""
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor

    def load(self, index: int | None = None) -> Tensor:
        """In memory of its own, past the mapping, whose pages would stay with the process.

        Raises:
            CheckpointError: the file has become shorter.
        """
        mapped = self.mapped()
        tensor = torch.empty_like(mapped if index is None else mapped[index])
        rest = tensor.flatten().view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + (index or 0) * tensor.nbytes)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise CheckpointError(
                        f"{self.path}: truncated while it was read; fetch it again"
                    )
                rest = rest[count:]
        return tensor


def check_shape(
    what: str, found: tuple[int, ...], shape: tuple[int, ...], index: int | None = None
) -> None:
    """Compare the shape that something has with the one that is asked for.

    Args:
        what: has it, for error messages.
        index: of its first dimension, if only that part is meant; ``shape`` is the part's.

    Raises:
        CheckpointError: the shapes differ, or there is no such part.
    """
    if found[0 if index is None else 1 :] != tuple(shape):
        part = "" if index is None else " in parts"
        raise CheckpointError(
            f"{what} has shape {list(found)}{part}, but config.json asks for {list(shape)}; they "
            "do not belong together"
        )
    if index is not None and index >= found[0]:
        raise CheckpointError(
            f"{what} has {found[0]} parts, but config.json asks for more than {index}; they do not "
            "belong together"
        )


class TensorFiles:
    """The tensors of a directory's safetensors files, by the names they have there.

    Raises:
        CheckpointError: a file is damaged.
    """

    def __init__(self, directory: Path, paths: Sequence[Path]) -> None:
        self._directory = directory
        self._tensors: dict[str, StoredTensor] = {}
        for path in paths:
            self._tensors |= _open(path)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        """The tensor of that name. Raises CheckpointError."""
        if name not in self._tensors:
            raise CheckpointError(
                f"{self._directory}: tensor {name!r} is missing in the weights; fetch them again, "
                "or correct config.json if it describes another model"
            )
        return self._tensors[name]

    def load(
        self,
        name: str,
        shape: tuple[int, ...],
        dtypes: Collection[str],
        index: int | None = None,
    ) -> Tensor:
        """A tensor in memory of its own, in the element type that is stored.

        Args:
            dtypes: that it may have, by safetensors' names.
            index: of its first dimension, if only that part is meant; ``shape`` is the part's.

        Raises:
            CheckpointError: it is missing or damaged, or has another shape or element type.
        """
        tensor = self[name]
        tensor.check_shape(shape, index)
        if tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{tensor.path}: tensor {name!r} is stored as {tensor.dtype}, but config.json asks "
                f"for {' or '.join(dtypes)}; they do not belong together"
            )
        return tensor.load(index)


def _open(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name."""
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); fetch it again") from None
    tensors = {}
    for name in file.keys():  # noqa: SIM118
        entry = header[name]
        first, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            name,
            path,
            file,
            8 + length + first,
            end - first,
            entry["dtype"],
            tuple(entry["shape"]),
        )
    return tensors
