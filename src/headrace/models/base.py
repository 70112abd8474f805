"""What the layer loop expects of a model, and what a model file gets to build itself from."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from headrace import models
from headrace.contracts.cache import CacheLayout
from headrace.errors import CheckpointError
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.ops.linear import Linear
from headrace.ops.table import Ops

Embedding = Callable[[Tensor], Tensor]
"""Token ids ``[T]`` -> their rows ``[T, width]``."""


class WeightSource(Protocol):
    """Where a model gets its parameters from; shapes are checked on the way."""

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        gated: bool = False,
    ) -> Linear:
        """One product for the weights ``name + ".weight"``, ``[rows[i], columns]``, stacked.

        ``gated``: there are two, a gate and what it gates.
        """

    def head(self, name: str, rows: int, columns: int) -> Linear:
        """The output head, ``name + ".weight"``; its ``rows`` serve as a tied embedding."""

    def embedding(self, name: str, rows: int, columns: int) -> Embedding:
        """An embedding that is no head as well, ``name + ".weight"``."""

    def vector(self, name: str, size: int) -> Tensor:
        """A parameter ``[size]``, such as a norm's weight."""

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""


class AttentionContext(Protocol):
    """The step as one layer sees it."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: RotaryEmbedding,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Rotate q and k by their positions, cache k and v, attend to each row's context.

        q is ``[T, heads, width]``, k and v ``[T, kv_heads, width]``, all unrotated. With a
        ``window``, a query sees only the last so many slots, its own included. Returns
        ``[T, heads * width]``.
        """


class DecoderLayer(ABC):
    """Two half-layers on the residual stream ``[T, hidden]``; both return the new stream."""

    @abstractmethod
    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Exchange between tokens: attention."""

    @abstractmethod
    def feed(self, hidden: Tensor) -> Tensor:
        """Work on each token alone: feed-forward."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the rest of Headrace must know of an architecture's configuration."""

    layers: int
    kv_heads: int
    head_dim: int
    context: int
    vocab_size: int


class DecoderModel(ABC):
    """A decoder-only language model, apart from the loop that runs its layers.

    A model file defines one, under the name ``Model``.
    """

    layers: Sequence[DecoderLayer]

    @abstractmethod
    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        """Build from ``config.json`` and a checkpoint. Raises CheckpointError."""

    @classmethod
    @abstractmethod
    def shape(cls, config: dict[str, Any]) -> ModelShape:
        """Sizes out of ``config.json``. Raises CheckpointError for what is not supported."""

    @classmethod
    @abstractmethod
    def cache_layout(cls, config: dict[str, Any], dtype: str, block_size: int) -> CacheLayout:
        """The planes of its layers, in cache groups."""

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """``[T]`` -> ``[T, hidden]``."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """``[T, hidden]`` -> logits ``[T, vocab]``."""


def known_architectures() -> list[str]:
    """The ``model_type`` of every model file."""
    skipped = {"base", "layers"}
    return sorted(m.name for m in pkgutil.iter_modules(models.__path__) if m.name not in skipped)


def find_architecture(config: dict[str, Any]) -> type[DecoderModel]:
    """The model file for a ``config.json``. Raises CheckpointError that lists the known ones."""
    model_type = config.get("model_type")
    known = known_architectures()
    if model_type not in known:
        raise CheckpointError(
            f"config.json: architecture (model_type) {model_type!r} is not supported; "
            f"known: {', '.join(known)}"
        )
    model: type[DecoderModel] = importlib.import_module(f"headrace.models.{model_type}").Model
    return model
