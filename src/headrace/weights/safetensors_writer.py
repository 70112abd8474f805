"""Writes a safetensors file piece by piece, aligned for use where it is mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from headrace.errors import CheckpointError

DATA_ALIGNMENT = 4096
TENSOR_ALIGNMENT = 64
PARTIAL = ".partial"
"""Ends the names of files that are being written."""
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""The element types that are written: torch's -> safetensors'."""


class SafetensorsWriter:
    """A context in which tensors are added; ``path`` appears, whole, when it ends well.

    The header stands before the tensors and is known after them, so room is reserved for it and
    filled up with spaces. The tensors begin at a multiple of 4,096 bytes and each at one of 64,
    with tensors named ``padding.0``, ``padding.1``, ... between, since the format has no gaps.

    Args:
        header_room: bytes for the header, rounded up to what aligns the tensors.

    Raises:
        CheckpointError: the file cannot be written; nothing is left of it.
    """

    def __init__(self, path: Path, header_room: int) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._start = -(-(8 + header_room) // DATA_ALIGNMENT) * DATA_ALIGNMENT
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._size = 0
        self._paddings = 0

    def __enter__(self) -> SafetensorsWriter:
        with explain_failed_writes(self._path):
            self._file = self._partial.open("wb")
            self._file.seek(self._start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with explain_failed_writes(self._path):
                with self._file:
                    if kind is None:
                        self._finish()
                if kind is None:
                    os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor (on the CPU; see ``DTYPES``) under a name of its own."""
        gap = -self._size % TENSOR_ALIGNMENT
        if gap:
            self._append(f"padding.{self._paddings}", torch.zeros(gap, dtype=torch.uint8))
            self._paddings += 1
        self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        if name in self._entries:
            raise ValueError(f"tensor {name!r} is there already")
        end = self._size + tensor.nbytes
        self._entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, end],
        }
        with explain_failed_writes(self._path):
            self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._size = end

    def _finish(self) -> None:
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        room = self._start - 8
        if len(header) > room:
            raise ValueError(f"the header takes {len(header)} bytes and has room for {room}")
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room))
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def explain_failed_writes(path: Path) -> Iterator[None]:
    """A context for writing ``path`` that turns an OSError into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); make room, or write somewhere else"
        ) from error
