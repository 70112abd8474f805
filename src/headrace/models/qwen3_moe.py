"""Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.decoder import Decoder, DecoderConfig, Parts, read_windows
from headrace.models.layers.feed_forward import FeedForward
from headrace.models.qwen2_moe import qwen_experts


class Model(Decoder):
    """Qwen3's attention, and experts without a shared one."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        bias = bool(config.get("attention_bias", False))
        windows = read_windows(config, sliding=bool(config.get("use_sliding_window")))
        return DecoderConfig.parse(
            config, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=windows
        )

    @classmethod
    def feed_forward(cls, parts: Parts, index: int, prefix: str) -> FeedForward:
        return qwen_experts(parts, index, prefix)
