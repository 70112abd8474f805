"""Qwen3-Next: three layers in four have a gated delta rule in place of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.contracts.cache import LayerState, attention_state
from headrace.models.layers.block import Mixer
from headrace.models.layers.decoder import Decoder, DecoderConfig, Parts, decoder_attention
from headrace.models.layers.feed_forward import FeedForward
from headrace.models.layers.gated_delta import DeltaShape, GatedDeltaMixer
from headrace.models.layers.rotary import RotaryEmbedding, head_order, rotated_part
from headrace.models.layers.values import read_layer_kinds, read_size
from headrace.models.qwen2_moe import qwen_experts


class Model(Decoder):
    """Attention is gated and turns a quarter of each head; norm weights lack 1."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        bias = bool(config.get("attention_bias", False))
        return DecoderConfig.parse(
            config, qkv_bias=bias, output_bias=bias, qk_norm=True, norm_offset=1.0
        )

    @classmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        parsed, delta = cls.parse(config), DeltaShape.parse(config)
        attention = attention_state(parsed.kv_heads, parsed.head_dim, dtype)
        return [attention if attends else delta.state() for attends in _attending(config)]

    @staticmethod
    def rotary(config: dict[str, Any], parsed: DecoderConfig) -> RotaryEmbedding:
        width = parsed.head_dim
        return RotaryEmbedding.from_config(config, width, rotated=rotated_part(config, width, 0.25))

    @classmethod
    def mixer(cls, parts: Parts, index: int, prefix: str) -> Mixer:
        raw, width = parts.raw, parts.config.head_dim
        if not _attending(raw)[index]:
            prefix = prefix.replace("self_attn", "linear_attn")
            return GatedDeltaMixer(index, prefix, DeltaShape.parse(raw), parts.weights)
        order = head_order(width, rotated_part(raw, width, 0.25))
        return decoder_attention(parts, index, prefix, parts.rotary, gated=True, order=order)

    @classmethod
    def feed_forward(cls, parts: Parts, index: int, prefix: str) -> FeedForward:
        return qwen_experts(parts, index, prefix)


def _attending(config: dict[str, Any]) -> list[bool]:
    """Which layers have attention; by default every fourth."""
    kinds = read_layer_kinds(config, "full_attention", "linear_attention")
    if kinds is not None:
        return [kind == "full_attention" for kind in kinds]
    interval = read_size(config, "full_attention_interval", 4)
    layers = read_size(config, "num_hidden_layers")
    return [(index + 1) % interval == 0 for index in range(layers)]
