"""A Hugging Face directory: ``config.json`` and safetensors, single or sharded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.json_file import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The element types that are read: safetensors' name -> torch's."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is: its file, opened by safetensors, and its first byte there."""

    path: Path
    file: Any
    offset: int


class SafetensorsCheckpoint:
    """Tensors of a directory by name: views of the mapped files, or read into memory.

    Raises:
        CheckpointError: no weights, a shard missing, or a file damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self._paths = self._find_files()
        self._places: dict[str, _Place] = {}
        for path in self._paths:
            self._places |= _open(path)

    def _find_files(self) -> list[Path]:
        """The weight files; all of them exist."""
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        if not index.is_file():
            if not single.is_file():
                raise CheckpointError(
                    f"neither {single} nor {index.name}, which several files need, exists there; "
                    "fetch it again"
                )
            return [single]
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise CheckpointError(
                f"{index}: 'weight_map' must map names of tensors to files; fetch it again"
            )
        paths = [self.directory / name for name in sorted(set(shards.values()))]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(
                    f"{path} does not exist, but {index.name} names it; fetch it again"
                )
        return paths

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor where its file is mapped.

        Args:
            dtype: that it must have; any of ``DTYPES`` if ``None``.

        Raises:
            CheckpointError: it is missing, or has another shape or dtype.
        """
        if name not in self._places:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is missing in the weights; fetch them again, "
                "or correct config.json if it describes another model"
            )
        path, file = self._places[name].path, self._places[name].file
        entry = file.get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {entry.get_shape()}, but config.json asks for "
                f"{list(shape)}; they do not belong together"
            )
        if dtype is None and entry.get_dtype() not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is stored as {entry.get_dtype()}; convert it to one of "
                f"{', '.join(DTYPES.values())}"
            )
        tensor: Tensor = file.get_tensor(name)
        if dtype is not None and tensor.dtype != dtype:
            raise CheckpointError(
                f"{path}: tensor {name!r} is stored as {tensor.dtype}, but the packed layout asks "
                f"for {dtype}; quantize the original model again"
            )
        return tensor

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in memory of its own, past the mapping, whose pages would stay with the process.

        Raises:
            CheckpointError: see ``view``; or the file has become shorter.
        """
        tensor = torch.empty_like(self.view(name, shape))
        place = self._places[name]
        rest = tensor.flatten().view(torch.uint8).numpy().data
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise CheckpointError(
                        f"{place.path}: truncated while it was read; fetch it again"
                    )
                rest = rest[count:]
        return tensor

    @property
    def num_bytes(self) -> int:
        """Size of the weight files."""
        return sum(path.stat().st_size for path in self._paths)

    @property
    def dtype(self) -> str:
        """Element type of the weights, by the configuration or else by the largest tensor."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
        entries = [place.file.get_slice(name) for name, place in self._places.items()]
        largest = max(entries, key=lambda entry: math.prod(entry.get_shape()), default=None)
        return DTYPES.get(largest.get_dtype(), "float32") if largest else "float32"


def _open(path: Path) -> dict[str, _Place]:
    """The tensors of a file by name."""
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); fetch it again") from None
    return {
        name: _Place(path, file, 8 + length + header[name]["data_offsets"][0])
        for name in file.keys()  # noqa: SIM118
    }
