"""Falcon-H1: attention and Mamba-2 side by side in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from headrace.contracts.cache import LayerState, attention_state
from headrace.models.base import AttentionContext, DecoderLayer, WeightSource
from headrace.models.layers.decoder import Decoder, DecoderConfig, Parts, decoder_attention
from headrace.models.layers.feed_forward import find_activation
from headrace.models.layers.mamba import MambaMixer, MambaShape
from headrace.models.layers.values import (
    read_interval,
    read_number,
    read_numbers,
    read_size,
)
from headrace.ops.table import Ops


class Model(Decoder):
    """Parts are weighed by multipliers (Falcon-H1, section 2)."""

    last_norm = "final_layernorm"

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        bias, mlp_bias = (bool(config.get(name)) for name in ("attention_bias", "mlp_bias"))
        parsed = DecoderConfig.parse(config, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)
        factor = read_number(config, "key_multiplier", 1.0)
        return replace(parsed, scale=factor * parsed.head_dim**-0.5)

    @classmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        parsed = cls.parse(config)
        attention = attention_state(parsed.kv_heads, parsed.head_dim, dtype)
        return [LayerState(attention.planes + _mixer_shape(config).planes())] * parsed.layers

    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        super().__init__(config, weights, ops)
        self._embedding_factor = read_number(config, "embedding_multiplier", 1.0)
        self._head_factor = read_number(config, "lm_head_multiplier", 1.0)

    @classmethod
    def block(cls, parts: Parts, index: int) -> DecoderLayer:
        return Block(parts, index)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return super().embed(input_ids, positions) * self._embedding_factor

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) * self._head_factor


class Block(DecoderLayer):
    """Both mixers read the same norm of the stream."""

    def __init__(self, parts: Parts, index: int) -> None:
        raw, config, weights = parts.raw, parts.config, parts.weights
        prefix = f"model.layers.{index}."
        self._ops = parts.ops
        self._norm, self._feed_norm = (
            parts.norm(prefix + name) for name in ("input_layernorm", "pre_ff_layernorm")
        )
        self._mamba = MambaMixer(index, prefix + "mamba.", _mixer_shape(raw), weights)
        self._attention = decoder_attention(parts, index, prefix + "self_attn.", parts.rotary)
        self._mamba_out = read_number(raw, "ssm_out_multiplier", 1.0)
        self._attention_in = read_number(raw, "attention_in_multiplier", 1.0)
        self._attention_out = read_number(raw, "attention_out_multiplier", 1.0)
        mlp, sizes = prefix + "feed_forward.", (config.intermediate, config.hidden)
        self._gate_up = weights.linear(
            [mlp + "gate_proj", mlp + "up_proj"], [sizes[0]] * 2, sizes[1], bias=config.mlp_bias
        )
        self._down = weights.linear([mlp + "down_proj"], [sizes[1]], sizes[0], bias=config.mlp_bias)
        self._activation = find_activation(config.activation)
        self._gate_factor, self._down_factor = read_numbers(raw, "mlp_multipliers", 2, 1.0)

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        x = self._ops.rms_norm(hidden, self._norm.weight, self._norm.eps)
        scanned = self._mamba(x, context) * self._mamba_out
        attended = self._attention(x * self._attention_in, context) * self._attention_out
        mixed: Tensor = hidden + scanned + attended
        return mixed

    def feed(self, hidden: Tensor) -> Tensor:
        gate, up = self._gate_up(hidden, norm=self._feed_norm).chunk(2, dim=-1)
        inner = up * self._activation(gate * self._gate_factor)
        return hidden + self._down(inner) * self._down_factor


def _mixer_shape(config: dict[str, Any]) -> MambaShape:
    hidden = read_size(config, "hidden_size")
    inner = read_size(config, "mamba_d_ssm", int(read_number(config, "mamba_expand", 2) * hidden))
    normed = bool(config.get("mamba_rms_norm", False))
    return MambaShape(
        hidden=hidden,
        inner=inner,
        heads=read_size(config, "mamba_n_heads"),
        groups=read_size(config, "mamba_n_groups", 1),
        state=read_size(config, "mamba_d_state", 256),
        kernel=read_size(config, "mamba_d_conv", 4),
        bias=bool(config.get("mamba_proj_bias", False)),
        convolution_bias=bool(config.get("mamba_conv_bias", True)),
        output_bias=bool(config.get("projectors_bias", False)),
        step_limit=read_interval(config, "time_step_limit"),
        norm_eps=read_number(config, "rms_norm_eps", 1e-5) if normed else None,
        gate_first=not config.get("mamba_norm_before_gate", True),
        multipliers=(
            read_number(config, "ssm_in_multiplier", 1.0),
            *read_numbers(config, "ssm_multipliers", 5, 1.0),
        ),
    )
