"""A Hugging Face directory: ``config.json`` and safetensors, single or sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
READABLE_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file; empty when it is optional and absent. Raises CheckpointError."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.name} is missing in {path.parent}")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


class SafetensorsCheckpoint:
    """Tensors of a directory by name, mapped from the files and read when asked for.

    Raises:
        CheckpointError: no weights, a shard missing, or a file damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self._files = [self._open(path) for path in self._paths()]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def _paths(self) -> list[Path]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: lacks its 'weight_map'")
            paths = [self.directory / name for name in sorted(set(weight_map.values()))]
        else:
            paths = [self.directory / SINGLE_FILE]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path.name} is missing in {self.directory}{self._hint()}")
        return paths

    def _hint(self) -> str:
        if any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt")):
            return "; pickled weights are not loaded, convert them to safetensors"
        return ""

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: damaged or truncated ({error}); fetch it again"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor as it is stored.

        Raises:
            CheckpointError: it is missing, or has another shape or an unknown dtype.
        """
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory}: tensor {name!r} is missing")
        tensor: Tensor = self._file_of[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} has shape {list(tensor.shape)}, "
                f"the configuration asks for {list(shape)}"
            )
        if tensor.dtype not in READABLE_DTYPES:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is stored as {tensor.dtype}; "
                "bfloat16, float16 and float32 are read"
            )
        return tensor

    @property
    def num_bytes(self) -> int:
        """Size of the weight files."""
        return sum(path.stat().st_size for path in self._paths())

    @property
    def dtype(self) -> str:
        """Element type of the weights, by the configuration or else by the largest tensor."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        largest = max(self._file_of, key=lambda n: self._slice_size(n), default=None)
        stored = self._file_of[largest].get_slice(largest).get_dtype() if largest else "F32"
        return names.get(stored, "float32")

    def _slice_size(self, name: str) -> int:
        size = 1
        for dimension in self._file_of[name].get_slice(name).get_shape():
            size *= dimension
        return size
