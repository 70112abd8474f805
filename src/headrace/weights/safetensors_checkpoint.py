"""A Hugging Face directory: ``config.json`` and safetensors, single or sharded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from headrace.disk import FilePlace
from headrace.errors import CheckpointError
from headrace.json_file import read_json
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.stored_blocks import StoredBlocks
from headrace.weights.stored_formats import find_stored_weights
from headrace.weights.tensor_files import StoredTensor, TensorFiles, check_shape

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The element types that are read as they are: safetensors' name -> torch's."""
_SMALL_DTYPES = ("F8_E4M3", "F8_E5M2")
"""Element types that are read as bfloat16, which has all of their values."""
_SCALES = ("_scale_inv", "_scale")


class SafetensorsCheckpoint(Checkpoint):
    """Tensors of a directory by name: views of the mapped files, or read into memory.

    Weights that the files hold quantized, in one of ``STORED_FORMATS``, have here the name and the
    shape that they have in the unquantized checkpoint, and are dequantized when they are read.

    Raises:
        CheckpointError: no weights, a shard missing, a file damaged, or weights quantized in a
            variant of their format that is not read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self._paths = self._find_files()
        self._files = TensorFiles(directory, self._paths)
        self._quantized = find_stored_weights(self.config, self._files)
        parts = {part for weight in self._quantized.values() for part in weight.parts}
        self._names = {name for name in self._files if name not in parts} | set(self._quantized)

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
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def view(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        index: int | None = None,
    ) -> Tensor:
        """A tensor where its file is mapped.

        Args:
            dtype: that it must have; any of ``DTYPES`` if ``None``.
            index: of its first dimension, if only that part is meant; ``shape`` is the part's.

        Raises:
            CheckpointError: it is missing, or has another shape or dtype.
        """
        stored = self._files[name]
        stored.check_shape(shape, index)
        if dtype is None:
            _check_dtype(stored)
        tensor = stored.mapped()
        if dtype is not None and tensor.dtype != dtype:
            raise CheckpointError(
                f"{stored.path}: tensor {name!r} is stored as {tensor.dtype}, but the packed "
                f"layout asks for {dtype}; quantize the original model again"
            )
        return tensor if index is None else tensor[index]

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None) -> Tensor:
        """A tensor in memory of its own; one that is stored quantized is dequantized in fp32.

        Args:
            index: see ``view``.

        Raises:
            CheckpointError: see ``view``; or the file has become shorter.
        """
        weight = self._quantized.get(name)
        if weight is not None:
            check_shape(weight.description, weight.shape, shape, index)
            return weight.read(index)
        stored = self._files[name]
        stored.check_shape(shape, index)
        if stored.dtype not in _SMALL_DTYPES:
            _check_dtype(stored)
            return stored.load(index)
        if any(name + suffix in self._files for suffix in _SCALES):
            raise CheckpointError(
                f"{stored.path}: tensor {name!r} is stored as {stored.dtype} with scales, of which "
                "config.json says nothing; take the model's unquantized checkpoint, and quantize "
                "it with `headrace quantize`"
            )
        return stored.load(index).bfloat16()

    def place(self, name: str) -> FilePlace | None:
        """See ``Checkpoint``."""
        if name in self._quantized:
            return None
        stored = self._files[name]
        return FilePlace(stored.path, stored.offset, stored.num_bytes)

    def kind(self, name: str, index: int | None = None) -> str:
        """See ``Checkpoint``: safetensors' names of types, or what is stored in their place."""
        weight = self._quantized.get(name)
        return self._files[name].dtype if weight is None else weight.kind

    def blocks(self, name: str, index: int | None = None) -> StoredBlocks | None:
        """See ``Checkpoint``."""
        weight = self._quantized.get(name)
        return None if weight is None else weight.blocks(index)

    def release(self) -> None:
        """See ``Checkpoint``: tensors are read past the mapping."""

    @property
    def num_bytes(self) -> int:
        """Size of the weight files, with quantized weights counted as they are read."""
        size = sum(path.stat().st_size for path in self._paths)
        for weight in self._quantized.values():
            stored = sum(self._files[part].num_bytes for part in weight.parts)
            size += math.prod(weight.shape) * torch.float32.itemsize - stored
        return size

    @property
    def dtype(self) -> str:
        """Element type of the weights, by the configuration or else by the largest tensor."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
        plain = [tensor for name in self._files if (tensor := self._files[name]).dtype in DTYPES]
        largest = max(plain, key=lambda tensor: math.prod(tensor.shape), default=None)
        return DTYPES[largest.dtype] if largest else "float32"


def _check_dtype(stored: StoredTensor) -> None:
    if stored.dtype not in DTYPES:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.name!r} is stored as {stored.dtype}; convert it to one "
            f"of {', '.join(DTYPES.values())}"
        )
