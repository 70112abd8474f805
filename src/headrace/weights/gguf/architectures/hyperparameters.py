"""Values of a file's metadata, checked where they are read."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.errors import CheckpointError
from headrace.weights.gguf.file import GGUFFile, StoredTensor

_TOKENS = {"bos_token_id": ("bos",), "pad_token_id": ("padding",), "eos_token_id": ("eos", "eot")}


class Hyperparameters:
    """The metadata of one architecture, by keys without its name in front, and the tensors.

    A value that is given for each layer counts as one where all layers have the same.

    Raises:
        CheckpointError: (by every method) a value is missing, or is not what it must be; names the
            key and the fix.
    """

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._file, self._architecture = file, architecture

    def fail(self, problem: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(
            f"{self._file.path}: {problem}; convert the original model again, or take another file"
        )

    def raw(self, key: str) -> Any:
        """A value as it is; ``None`` if it is missing."""
        return self._file.metadata.get(f"{self._architecture}.{key}")

    def _find(self, keys: tuple[str, ...], default: Any) -> Any:
        for key in keys:
            value = self.raw(key)
            if value is None:
                continue
            if isinstance(value, np.ndarray):
                each = set(value.tolist())
                if len(each) != 1:
                    raise self.fail(
                        f"{self._architecture}.{key} differs between layers, which is not supported"
                    )
                (value,) = each
            return value
        if default is None:
            names = " and ".join(f"{self._architecture}.{key}" for key in keys)
            raise self.fail(f"the metadata lack {names}")
        return default

    def count(self, *keys: str, default: int | None = None) -> int:
        """An integer that is not negative, under the first of the keys that there is."""
        value = self._find(keys, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(f"{self._architecture}.{keys[0]} must be a whole number, got {value!r}")
        return value

    def size(self, *keys: str, default: int | None = None) -> int:
        """A positive integer, under the first of the keys that there is."""
        value = self.count(*keys, default=default)
        if value == 0:
            raise self.fail(f"{self._architecture}.{keys[0]} must be positive, got 0")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """A number that is not negative, under the first of the keys that there is."""
        value = self._find(keys, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < float("inf"):
            raise self.fail(f"{self._architecture}.{keys[0]} must be a number, got {value!r}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A number that is not negative; ``None`` if it is missing."""
        return None if self.raw(key) is None else self.number(key)

    def per_layer(self, key: str) -> list[bool] | None:
        """True or false for each layer; ``None`` if it is missing, or one for all."""
        value = self.raw(key)
        return value.astype(bool).tolist() if isinstance(value, np.ndarray) else None

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._find((key,), default)
        if not isinstance(value, bool):
            raise self.fail(f"{self._architecture}.{key} must be true or false, got {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._find((key,), default)
        if not isinstance(value, str):
            raise self.fail(f"{self._architecture}.{key} must be a string, got {value!r}")
        return value

    def __contains__(self, tensor: str) -> bool:
        """Whether the file has a tensor of that name."""
        return tensor in self._file.tensors

    def tensor(self, name: str) -> StoredTensor:
        """A tensor of the file."""
        if name not in self._file.tensors:
            raise self.fail(f"tensor {name!r} is missing")
        return self._file.tensors[name]

    def check_shape(self, tensor: StoredTensor, dimensions: int, multiple_of: int = 1) -> None:
        """Refuse a tensor that has not so many dimensions, the first such a multiple."""
        shape = tensor.shape
        if len(shape) != dimensions or shape[0] % multiple_of:
            raise self.fail(
                f"tensor {tensor.name!r} has shape {list(shape)}, and must have {dimensions} "
                f"dimensions, the first a multiple of {multiple_of}"
            )

    def layers(self) -> int:
        """How many there are."""
        layers, tensors = self.size("block_count"), len(self._file.tensors)
        if layers > tensors:
            raise self.fail(f"{layers} layers cannot be made of {tensors} tensors")
        return layers

    def heads(self) -> int:
        """Heads of queries."""
        return self.size("attention.head_count")

    def general(self) -> dict[str, Any]:
        """What every ``config.json`` has: sizes of vocabulary and context, and special tokens.

        The vocabulary's is that of the embedding, which may have more rows than there are tokens.
        """
        config: dict[str, Any] = {
            "vocab_size": self.tensor("token_embd.weight").shape[0],
            "max_position_embeddings": self.size("context_length"),
            "tie_word_embeddings": "output.weight" not in self,
        }
        for field, kinds in _TOKENS.items():
            keys = [f"tokenizer.ggml.{kind}_token_id" for kind in kinds]
            found = [self._file.metadata[key] for key in keys if key in self._file.metadata]
            if not all(isinstance(token, int) for token in found):
                raise self.fail(f"{' and '.join(keys)} must be whole numbers")
            if found:
                config[field] = found[0] if len(set(found)) == 1 else found
        return config
