"""What the layer loop expects of a model, and what a model file gets to build itself from."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from headrace import models
from headrace.contracts.cache import LayerState
from headrace.contracts.load_map import GatedNames, LoadMap
from headrace.errors import CheckpointError
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.ops.linear import Linear
from headrace.ops.neurons import NeuronProduct
from headrace.ops.paged import AttentionSpec
from headrace.ops.recurrent import RowSpans
from headrace.ops.table import Ops

Embedding = Callable[[Tensor], Tensor]
"""Token ids ``[T]`` -> their rows ``[T, width]``."""


class WeightSource(Protocol):
    """Where a model gets its parameters from; shapes are checked on the way.

    Names are those of the architecture's load map.
    """

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
        """One product for the weights ``name + ".weight"``, ``[rows[i], columns]``, stacked.

        Args:
            gated: the first half of all rows are a gate, the second what it gates.
            order: for each row of the product, the row of the stack that it is.
            adaptable: whether an adapter may change it, row by row of the step; it then always gets
                all inputs of the step.
        """

    def head(self, name: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
        """The output head, ``name + ".weight"``; its ``rows`` serve as a tied embedding."""

    def embedding(self, name: str, rows: int, columns: int) -> Embedding:
        """An embedding that is no head as well, ``name + ".weight"``."""

    def vector(self, name: str, size: int) -> Tensor:
        """A parameter ``[size]`` in the compute dtype, such as a norm's weight."""

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A parameter of any shape that is used as it is, by default in the compute dtype."""

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""


class NeuronStep(Protocol):
    """A step of which some inputs go through some of the inner neurons, as one layer sees it.

    ``whole`` are the inputs that go through all of them and ``partial`` those that go through some,
    int64 ``[n]``; of an input that is in both, what some make of it is the result. ``partial`` is
    ``None`` if all inputs are whole, ``whole`` is ``None`` if all or none are.
    """

    whole: Tensor | None
    partial: Tensor | None

    def observe(self, layer: int, inner: Tensor) -> None:
        """Take note of what the inner neurons say to the ``whole`` inputs, ``[n, neurons]``."""

    def chosen(self, layer: int) -> Tensor:
        """The neurons of each ``partial`` input, int32 ``[n, most]``, -1 behind the last."""


class NeuronRoutes:
    """How the inputs of the micro-batch that runs go through the inner neurons.

    The layer loop sets it before the layers run.

    Attributes:
        step: ``None`` where all inputs go through all neurons and nobody takes note.
    """

    __slots__ = ("step",)

    def __init__(self) -> None:
        self.step: NeuronStep | None = None


class DividedFeedForward(Protocol):
    """A gated feed-forward that all inputs of a layer go through, be it in part.

    Attributes:
        names: of its weights.
        activation: of the gate.
    """

    names: GatedNames
    activation: Callable[[Tensor], Tensor]

    def divide(self, layer: int, neurons: NeuronProduct, routes: NeuronRoutes) -> None:
        """From now on, let inputs go through some inner neurons where ``routes`` say so."""


class AttentionContext(Protocol):
    """The step as one layer sees it."""

    rows: RowSpans
    """Which inputs belong to which sequence."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: RotaryEmbedding,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Rotate q and k by their positions, cache k and v, attend to each row's context.

        q is ``[T, heads, width]``, k and v ``[T, kv_heads, width]``, all unrotated. ``sinks``
        ``[heads]`` are scores of keys without a value. Returns ``[T, heads * width of v]``.
        """

    def angles(self, rotary: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the inputs' positions, ``[T, width / 2]``."""

    def states(self, layer: int) -> dict[str, Tensor]:
        """The layer's planes of scope "sequence", ``[table rows, heads, width]``."""


class DecoderLayer(ABC):
    """Two half-layers on the residual stream ``[T, hidden]``; both return the new stream.

    Attributes:
        gated: its feed-forward, if that is a gated one.
    """

    gated: DividedFeedForward | None = None

    @abstractmethod
    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Exchange between tokens: attention."""

    @abstractmethod
    def feed(self, hidden: Tensor) -> Tensor:
        """Work on each token alone: feed-forward."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the rest of Headrace must know of an architecture's configuration.

    Args:
        context: positions that it knows.
    """

    context: int
    vocab_size: int


class DecoderModel(ABC):
    """A decoder-only language model, apart from the loop that runs its layers.

    A model file defines one, under the name ``Model``.
    """

    layers: Sequence[DecoderLayer]
    load_map: ClassVar[LoadMap] = LoadMap()
    """Where the checkpoint has what the model asks for."""
    causal: ClassVar[bool] = True
    """Whether a token is computed from those before it alone; else the model makes embeddings, and
    nothing is generated.
    """
    rotary_attention: ClassVar[bool] = True
    """Whether positions reach it only through ``AttentionContext.attend``, as rotations."""

    @abstractmethod
    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        """Build from ``config.json`` and a checkpoint. Raises CheckpointError."""

    @classmethod
    @abstractmethod
    def shape(cls, config: dict[str, Any]) -> ModelShape:
        """Sizes out of ``config.json``. Raises CheckpointError for what is not supported."""

    @classmethod
    @abstractmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        """What each layer keeps of a sequence; ``dtype`` is that of the KV cache."""

    @abstractmethod
    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """``[T]`` and ``[T]`` -> ``[T, hidden]``."""

    @abstractmethod
    def norm(self, hidden: Tensor) -> Tensor:
        """What comes out of the last layer, ``[T, hidden]``, as embeddings are made of it."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """What comes out of the last layer, ``[T, hidden]`` -> logits ``[T, vocab]``."""


def known_architectures() -> list[str]:
    """The ``model_type`` of every model file."""
    skipped = {"base", "layers"}
    return sorted(m.name for m in pkgutil.iter_modules(models.__path__) if m.name not in skipped)


def find_architecture(config: dict[str, Any]) -> type[DecoderModel]:
    """The model file for a ``config.json``. Raises CheckpointError that lists the known ones."""
    model_type = config.get("model_type")
    name = str(model_type).replace("-", "_")
    known = known_architectures()
    if name not in known:
        raise CheckpointError(
            f"config.json: architecture (model_type) {model_type!r} is not supported; "
            f"known: {', '.join(known)}"
        )
    model: type[DecoderModel] = importlib.import_module(f"headrace.models.{name}").Model
    return model
