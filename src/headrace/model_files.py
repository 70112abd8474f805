"""The files of a model: a Hugging Face directory, or one GGUF file that has everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from headrace.contracts.step import Pooling
from headrace.embedding import EmbeddingSettings, default_pooling, read_pooling
from headrace.errors import CheckpointError
from headrace.json_file import read_json
from headrace.text.tokenizer import Tokenizer
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.gguf.checkpoint import GGUFCheckpoint
from headrace.weights.gguf.file import GGUFFile
from headrace.weights.hub import is_gguf
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint

_POOLING: dict[int, Pooling | None] = {0: None, 1: "mean", 2: "first", 3: "last"}
"""Ways of pooling by GGUF's numbers; 0: the file says none."""


class ModelFiles(ABC):
    """What belongs to a model.

    Attributes:
        path: of the directory, or of the file.
        checkpoint: its configuration and tensors.
        generation: as in ``generation_config.json``.
    """

    path: Path
    checkpoint: Checkpoint
    generation: dict[str, Any]

    @abstractmethod
    def read_tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises CheckpointError."""

    @abstractmethod
    def read_pooling(self, causal: bool) -> EmbeddingSettings:
        """How its hidden states become embeddings. Raises CheckpointError."""


class DirectoryFiles(ModelFiles):
    """A Hugging Face directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = SafetensorsCheckpoint(path)
        self.generation = read_json(path / "generation_config.json", required=False)

    def read_tokenizer(self) -> Tokenizer:
        return Tokenizer(self.path)

    def read_pooling(self, causal: bool) -> EmbeddingSettings:
        return read_pooling(self.path, causal)


class GGUFFiles(ModelFiles):
    """A GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        checkpoint = GGUFCheckpoint(path)
        self.checkpoint, self._metadata = checkpoint, checkpoint.file.metadata
        self.generation = {}

    def read_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._metadata, str(self.path))

    def read_pooling(self, causal: bool) -> EmbeddingSettings:
        key = f"{self._metadata.get('general.architecture')}.pooling_type"
        number = self._metadata.get(key, 0)
        if number not in _POOLING:
            known = ", ".join(map(str, _POOLING))
            raise CheckpointError(f"{self.path}: {key} {number} is not supported; known: {known}")
        return EmbeddingSettings(_POOLING[number] or default_pooling(causal))


def open_model(path: Path) -> ModelFiles:
    """The files at a path that ``resolve_model`` gives. Raises CheckpointError."""
    return GGUFFiles(path) if is_gguf(path) else DirectoryFiles(path)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a directory without weights, or of a GGUF file. Raises CheckpointError."""
    if is_gguf(path):
        return Tokenizer.from_gguf(GGUFFile(path).metadata, str(path))
    return Tokenizer(path)
