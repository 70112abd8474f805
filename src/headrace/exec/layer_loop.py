"""The order in which micro-batches pass through layers; models know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.contracts.step import Pooling
from headrace.exec.batch import ForwardBatch
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.ops.adapted_linear import AdapterRoutes
from headrace.ops.paged import AttentionSpec
from headrace.ops.reference import add_sinks
from headrace.ops.table import Ops


class LayerContext:
    """The ``AttentionContext`` of one micro-batch."""

    def __init__(self, batch: ForwardBatch, arena: KVArena, ops: Ops) -> None:
        self.rows = batch.rows
        self._batch = batch
        self._arena = arena
        self._ops = ops
        self._angles: dict[RotaryEmbedding, tuple[Tensor, Tensor]] = {}

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
        """See ``AttentionContext``."""
        cos, sin = self.angles(rotary)
        out, lse = self._ops.attention.attend(
            q,
            k,
            v,
            cos,
            sin,
            self._arena.cache(layer),
            spec,
            self._batch.attention[self._arena.group_of(layer)],
        )
        if sinks is not None:
            out = add_sinks(out, lse, sinks)
        return out.flatten(1)

    def angles(self, rotary: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """See ``AttentionContext``."""
        if rotary not in self._angles:
            self._angles[rotary] = rotary.cos_sin(self._batch.positions, self._ops.dtype)
        return self._angles[rotary]

    def states(self, layer: int) -> dict[str, Tensor]:
        """See ``AttentionContext``."""
        return self._arena.states(layer)


class LayerLoop:
    """Runs a model over micro-batches: all layers of one before the next begins."""

    def __init__(
        self, model: DecoderModel, arena: KVArena, ops: Ops, routes: AdapterRoutes
    ) -> None:
        self._routes = routes
        self._model = model
        self._arena = arena
        self._ops = ops

    def run(self, batches: Sequence[ForwardBatch]) -> Tensor:
        """Hidden states of all inputs, ``[T, hidden]``, before the final norm."""
        hidden = [self._run_layers(batch) for batch in batches]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _run_layers(self, batch: ForwardBatch) -> Tensor:
        context = LayerContext(batch, self._arena, self._ops)
        self._routes.rows = batch.adapted
        hidden = self._model.embed(batch.input_ids, batch.positions)
        for layer in self._model.layers:
            hidden = layer.mix(hidden, context)
            hidden = layer.feed(hidden)
        return hidden

    def pool(self, hidden: Tensor, pooling: Pooling) -> Tensor:
        """``[T, hidden]`` of a row -> ``[hidden]``: of the last or first input, or the sum."""
        if pooling == "mean":
            return self._model.norm(hidden).float().sum(0)
        return self._model.norm(hidden[-1:] if pooling == "last" else hidden[:1])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden]`` -> ``[R, vocab]``; row by row where ops are batch-invariant."""
        if not self._ops.batch_invariant:
            return self._model.head(hidden)
        return torch.cat([self._model.head(row) for row in hidden.split(1)])
