"""Self-attention over the KV cache, as most decoders have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.models.base import AttentionContext, WeightSource
from headrace.models.layers.rotary import RotaryEmbedding, repeat_order
from headrace.ops.linear import RMSNorm
from headrace.ops.paged import AttentionSpec
from headrace.ops.table import Ops

SEPARATE = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of a layer and what its projections are called.

    Args:
        projections: stored tensors that together are queries, keys and values, in this order.
        output: the stored tensor that leads back to the residual stream.
        bias, output_bias: whether projections and output have biases.
        order: order of the elements of a query's or key's head; see ``head_order``.
        interleaved: heads are stored one after another, each with its query, key and value.
        gated: each query head comes with a gate of its output (Gated Attention for Large Language
            Models, section 2).
    """

    hidden: int
    heads: int
    kv_heads: int
    width: int
    projections: Sequence[str] = SEPARATE
    output: str = "o_proj"
    bias: bool = False
    output_bias: bool = False
    order: Sequence[int] | None = None
    interleaved: bool = False
    gated: bool = False

    def rows(self) -> list[int]:
        """Rows of each stored projection."""
        queries = self.heads * self.width * (2 if self.gated else 1)
        sizes = [queries, self.kv_heads * self.width, self.kv_heads * self.width]
        return sizes if len(self.projections) == 3 else [sum(sizes)]

    def row_order(self) -> list[int] | None:
        """For each row of queries, gates, keys and values, the stored row that it is."""
        if self.order is None and not self.interleaved and not self.gated:
            return None
        plain, width = list(range(self.width)), self.width
        turned = plain if self.order is None else list(self.order)
        if self.interleaved:
            queries = repeat_order(turned, self.heads, 3 * width)
            keys = [width + row for row in queries]
            values = [2 * width + row for row in repeat_order(plain, self.heads, 3 * width)]
            return queries + keys + values
        stride = 2 * width if self.gated else width
        queries = repeat_order(turned, self.heads, stride)
        if self.gated:
            queries += [width + row for row in repeat_order(plain, self.heads, stride)]
        keys = [len(queries) + row for row in repeat_order(turned, self.kv_heads)]
        first = len(queries) + len(keys)
        return queries + keys + list(range(first, first + self.kv_heads * width))


class SelfAttention:
    """Grouped-query attention (GQA: Training Generalized Multi-Query Transformer Models).

    Args:
        index: of the layer, by which its cache is found.
        prefix: of the stored tensors.
        head_norms: of every query and key head.
        sinks: ``[heads]``; see ``AttentionContext``.
    """

    def __init__(
        self,
        index: int,
        prefix: str,
        shape: AttentionShape,
        spec: AttentionSpec,
        rotary: RotaryEmbedding,
        weights: WeightSource,
        ops: Ops,
        *,
        head_norms: tuple[RMSNorm, RMSNorm] | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self._index, self._spec, self._rotary, self._ops = index, spec, rotary, ops
        self._head_norms, self._sinks = head_norms, sinks
        gates = [shape.heads] if shape.gated else []
        self._parts, self._width = [shape.heads, *gates, *[shape.kv_heads] * 2], shape.width
        self._qkv = weights.linear(
            [prefix + name for name in shape.projections],
            shape.rows(),
            shape.hidden,
            bias=shape.bias,
            order=shape.row_order(),
        )
        self._output = weights.linear(
            [prefix + shape.output],
            [shape.hidden],
            shape.heads * shape.width,
            bias=shape.output_bias,
        )

    def __call__(
        self,
        x: Tensor,
        context: AttentionContext,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See ``Mixer``."""
        qkv = self._qkv(x, norm=norm).view(x.shape[0], -1, self._width)
        q, *gates, k, v = qkv.split_with_sizes(self._parts, dim=1)
        if self._head_norms is not None:
            for_q, for_k = self._head_norms
            q = self._ops.rms_norm(q, for_q.weight, for_q.eps)
            k = self._ops.rms_norm(k, for_k.weight, for_k.eps)
        out = context.attend(self._index, q, k, v, self._rotary, self._spec, self._sinks)
        for gate in gates:
            out = out * torch.sigmoid(gate.flatten(1))
        return self._output(out, residual=residual)
