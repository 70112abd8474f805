"""Phi-3, Phi-3.5 and Phi-4-mini."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.block import Mixer
from headrace.models.layers.decoder import (
    Decoder,
    DecoderConfig,
    Parts,
    decoder_attention,
    read_windows,
)
from headrace.models.layers.feed_forward import FeedForward, GatedFeedForward
from headrace.models.layers.rotary import RotaryEmbedding, head_order, rotated_part


class Model(Decoder):
    """Llama's shape with fused projections; of each head, a part is rotated."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        return DecoderConfig.parse(config, windows=read_windows(config, sliding=True))

    @staticmethod
    def rotary(config: dict[str, Any], parsed: DecoderConfig) -> RotaryEmbedding:
        width = parsed.head_dim
        return RotaryEmbedding.from_config(config, width, rotated=rotated_part(config, width))

    @classmethod
    def mixer(cls, parts: Parts, index: int, prefix: str) -> Mixer:
        width = parts.config.head_dim
        rotated = rotated_part(parts.raw, width)
        order = head_order(width, rotated) if rotated != width else None
        return decoder_attention(
            parts, index, prefix, parts.rotary, projections=("qkv_proj",), order=order
        )

    @classmethod
    def feed_forward(cls, parts: Parts, index: int, prefix: str) -> FeedForward:
        config = parts.config
        return GatedFeedForward(
            prefix,
            config.hidden,
            config.intermediate,
            parts.weights,
            names=("gate_up_proj",),
            activation=config.activation,
        )
