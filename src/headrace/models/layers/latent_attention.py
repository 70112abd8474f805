"""Attention over a latent that keys and values are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.cache import LayerState, PlaneSpec
from headrace.models.base import AttentionContext, WeightSource
from headrace.models.layers.normalization import read_rms_norm
from headrace.models.layers.rotary import (
    RotaryEmbedding,
    head_order,
    rope_parameters,
    yarn_scale,
)
from headrace.models.layers.values import read_count, read_number, read_positive, read_size
from headrace.ops.linear import RMSNorm
from headrace.ops.paged import AttentionSpec
from headrace.ops.reference import rotate
from headrace.ops.table import Ops


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Sizes of multi-head latent attention.

    Args:
        latent: of what is cached in place of keys and values.
        query_latent: that queries go through; 0: none.
        plain, rotated: elements of a head that positions do not touch, and that they turn.
        value: elements of a head's value.
        interleaved: whether pairs that are turned lie side by side in the checkpoint.
    """

    hidden: int
    heads: int
    latent: int
    query_latent: int
    plain: int
    rotated: int
    value: int
    scale: float
    bias: bool
    interleaved: bool

    @classmethod
    def parse(cls, config: dict[str, Any], *, interleaved: bool) -> LatentShape:
        """Out of ``config.json``. Raises CheckpointError."""
        plain, rotated = (read_size(config, f"qk_{part}_head_dim") for part in ("nope", "rope"))
        values = rope_parameters(config)
        scale = (plain + rotated) ** -0.5
        sharpness = read_positive(values, "mscale_all_dim")
        if sharpness is not None and values.get("rope_type", "default") != "default":
            scale *= yarn_scale(read_number(values, "factor"), sharpness) ** 2
        return cls(
            hidden=read_size(config, "hidden_size"),
            heads=read_size(config, "num_attention_heads"),
            latent=read_size(config, "kv_lora_rank"),
            query_latent=read_count(config, "q_lora_rank"),
            plain=plain,
            rotated=rotated,
            value=read_size(config, "v_head_dim"),
            scale=scale,
            bias=bool(config.get("attention_bias", False)),
            interleaved=interleaved,
        )

    def state(self, dtype: str) -> LayerState:
        """The latent and the part of the keys that positions turn, for each token."""
        return LayerState((PlaneSpec("key", "slot", 1, self.latent + self.rotated, dtype),))


class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1).

    What would make keys and values of the latent is multiplied into queries and outputs instead,
    so that all heads attend to the latent itself, which is key and value at once.
    """

    def __init__(
        self,
        index: int,
        prefix: str,
        shape: LatentShape,
        rotary: RotaryEmbedding,
        weights: WeightSource,
        ops: Ops,
    ) -> None:
        self._index, self._shape, self._rotary, self._ops = index, shape, rotary, ops
        self._spec = AttentionSpec(shape.scale, value_width=shape.latent)
        self._upright = RotaryEmbedding.identity(shape.latent + shape.rotated)
        turned = head_order(shape.rotated, shape.rotated, interleaved=shape.interleaved)
        head = [*range(shape.plain), *(shape.plain + row for row in turned)]
        width = len(head)
        query_order = [h * width + row for h in range(shape.heads) for row in head]
        rows, hidden = shape.heads * width, shape.hidden
        self._query_down = None
        if shape.query_latent:
            self._query_down = weights.linear(
                [prefix + "q_a_proj"], [shape.query_latent], hidden, bias=shape.bias
            )
            self._query_norm = read_rms_norm(
                weights, prefix + "q_a_layernorm", shape.query_latent, 1e-6
            )
            self._query = weights.linear(
                [prefix + "q_b_proj"], [rows], shape.query_latent, order=query_order
            )
        else:
            self._query = weights.linear([prefix + "q_proj"], [rows], hidden, order=query_order)
        self._down = weights.linear(
            [prefix + "kv_a_proj_with_mqa"],
            [shape.latent + shape.rotated],
            hidden,
            bias=shape.bias,
            order=[*range(shape.latent), *(shape.latent + row for row in turned)],
        )
        self._norm = read_rms_norm(weights, prefix + "kv_a_layernorm", shape.latent, 1e-6)
        up = weights.tensor(
            prefix + "kv_b_proj.weight",
            (shape.heads * (shape.plain + shape.value), shape.latent),
        ).view(shape.heads, -1, shape.latent)
        self._key_up = up[:, : shape.plain]
        self._value_up = up[:, shape.plain :].transpose(1, 2)
        self._output = weights.linear(
            [prefix + "o_proj"], [hidden], shape.heads * shape.value, bias=shape.bias
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
        shape, tokens = self._shape, len(x)
        if self._query_down is None:
            q = self._query(x, norm=norm)
        else:
            q = self._query(self._query_down(x, norm=norm), norm=self._query_norm)
        q_plain, q_turned = q.view(tokens, shape.heads, -1).split([shape.plain, shape.rotated], 2)
        latent, k_turned = self._down(x, norm=norm).split([shape.latent, shape.rotated], 1)
        latent = self._ops.rms_norm(latent, self._norm.weight, self._norm.eps)
        cos, sin = context.angles(self._rotary)
        q_latent = torch.einsum("thd,hdl->thl", q_plain, self._key_up)
        q = torch.cat((q_latent, rotate(q_turned, cos, sin)), dim=-1)
        k = torch.cat((latent.unsqueeze(1), rotate(k_turned.unsqueeze(1), cos, sin)), dim=-1)
        out = context.attend(self._index, q, k, k, self._upright, self._spec)
        out = out.view(tokens, shape.heads, shape.latent)
        values = torch.einsum("thl,hlv->thv", out, self._value_up)
        return self._output(values.flatten(1), residual=residual)
