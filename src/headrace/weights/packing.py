"""Plain checkpoints into packed ones: docs/weights.md says how these look."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.contracts.load_map import LoadMap
from headrace.errors import CheckpointError, ConfigurationError
from headrace.ops.linear import Linear
from headrace.ops.packed_weight import WeightFormat
from headrace.weights.absent_linear import AbsentLinear
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.formats import WeightPlan
from headrace.weights.hub import COMPANION_FILES
from headrace.weights.quantizers import Quantizer, pack_weight
from headrace.weights.reader import Progress, Stack, WeightReader
from headrace.weights.safetensors_checkpoint import INDEX_FILE, SINGLE_FILE
from headrace.weights.safetensors_writer import (
    PARTIAL,
    SafetensorsWriter,
    explain_failed_writes,
)

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class PackedModel:
    """What was written: formats, and the bytes of each part.

    ``vector_bytes`` are those of norms and biases; a tied embedding is the head's.
    """

    weight_format: str
    head_format: str
    layer_bytes: int
    head_bytes: int
    embedding_bytes: int
    vector_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        return self.layer_bytes + self.head_bytes + self.embedding_bytes + self.vector_bytes


class CheckpointPacker:
    """A ``WeightSource`` that writes what a model asks for, each part in its format.

    So the model's own file says which weights are stacked, which are gated and which is the head.
    """

    def __init__(
        self,
        reader: WeightReader,
        writer: SafetensorsWriter,
        plan: WeightPlan,
        quantizer: Quantizer,
    ) -> None:
        self._bytes = dict.fromkeys(("layer", "head", "embedding", "vector"), 0)
        self._reader = reader
        self._writer = writer
        self._plan = plan
        self._quantizer = quantizer

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def summary(self) -> PackedModel:
        """What was written so far."""
        body, head = self._plan.body, self._plan.head
        assert body is not None and head is not None
        sizes = {f"{part}_bytes": size for part, size in self._bytes.items()}
        return PackedModel(body.name, head.name, **sizes)

    def vector(self, name: str, size: int) -> Tensor:
        """A parameter ``[size]``, written as it is stored."""
        return self._write("vector", name, self._reader.read(name, (size,)))

    def embedding(self, name: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        """A table ``[rows, columns]``, written in bf16."""
        stored = self._reader.read(f"{name}.weight", (rows, columns))
        self._write("embedding", f"{name}.weight", stored.bfloat16())
        return AbsentLinear().rows

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A parameter of any shape, written as it is stored."""
        return self._write("vector", name, self._reader.read(name, tuple(shape)))

    def head(self, name: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
        """The output head, written in its format."""
        return self._pack("head", Stack([name], [rows], columns, bias), self._plan.head)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        gated: bool = False,
        order: Sequence[int] | None = None,
        adaptable: bool = True,
    ) -> Linear:
        """A stack of weights, written in the body's format."""
        stack = Stack(names, rows, columns, bias, gated, order)
        return self._pack("layer", stack, self._plan.body)

    def _pack(self, part: str, stack: Stack, format: WeightFormat | None) -> Linear:
        assert format is not None
        weight, bias = self._reader.weight(stack), self._reader.bias(stack)
        packed = pack_weight(weight, format, stack.gated, self._quantizer)
        for kind, tensor in packed.parts().items():
            self._write(part, f"{stack.name}.{kind}", tensor)
        if bias is not None:
            self._write("vector", f"{stack.name}.bias", bias)
        return AbsentLinear()

    def _write(self, part: str, name: str, tensor: Tensor) -> Tensor:
        self._writer.add(name, tensor)
        self._bytes[part] += tensor.nbytes
        return tensor


@contextmanager
def packed_checkpoint(
    source: Checkpoint,
    load_map: LoadMap,
    target: Path,
    plan: WeightPlan,
    quantizer: Quantizer,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Iterator[CheckpointPacker]:
    """A context that writes the checkpoint ``target`` from what a model takes of its packer.

    Whatever ends it early, the directory ``target`` is then no checkpoint: what makes it one,
    ``config.json``, is written last.

    Raises:
        ConfigurationError: ``target`` holds a checkpoint, and ``force`` is not set.
        CheckpointError: ``source`` is quantized already, or ``target`` cannot be written.
    """
    plan = plan.completed()
    made = not target.exists()
    _check(source, target, force)
    try:
        with explain_failed_writes(target):
            target.mkdir(parents=True, exist_ok=True)
        with SafetensorsWriter(target / SINGLE_FILE, _header_room(source)) as writer:
            reader = WeightReader(source, load_map, progress)
            yield CheckpointPacker(reader, writer, plan, quantizer)
            for name in (CONFIG_FILE, INDEX_FILE):
                (target / name).unlink(missing_ok=True)
        with explain_failed_writes(target):
            _copy_files(source.directory, target)
            config = {**source.config, "dtype": source.dtype, "quantization_config": plan.section()}
            partial = target / (CONFIG_FILE + PARTIAL)
            partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, target / CONFIG_FILE)
    except BaseException:
        if made:
            shutil.rmtree(target, ignore_errors=True)
        raise


def _check(source: Checkpoint, target: Path, force: bool) -> None:
    if WeightPlan.stored(source.config) is not None:
        raise CheckpointError(
            f"{source.directory} is packed already; quantize the original model instead"
        )
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"output: {target} is a file; name a directory")
    if target.samefile(source.directory):
        raise ConfigurationError(f"output: {target} is the model itself; name another directory")
    # What a killed process left is no checkpoint, and is written anew.
    if not force and any(file.suffix != PARTIAL for file in target.iterdir()):
        raise ConfigurationError(
            f"output: {target} is not empty; name another directory, or overwrite the checkpoint "
            "in it with --force"
        )


def _header_room(source: Checkpoint) -> int:
    """More than the header can take: a source tensor becomes three entries at most.

    Names of stacks are no longer than those of their parts together; offsets, sizes and a padding
    before each entry have up to 200 bytes.
    """
    return 1024 + sum(3 * len(name.encode()) + 3 * 400 for name in source)


def _copy_files(source: Path, target: Path) -> None:
    """What belongs to a checkpoint beside its weights: tokenizer, chat template, defaults."""
    for pattern in COMPANION_FILES:
        for file in source.glob(pattern):
            if file.name not in (CONFIG_FILE, INDEX_FILE):
                shutil.copyfile(file, target / file.name)
