"""Qwen3, dense."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.decoder import Decoder, DecoderConfig
from headrace.models.qwen2 import qwen_windows


class Model(Decoder):
    """Llama's shape with an RMS norm on every query and key head."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        bias = bool(config.get("attention_bias", False))
        windows = qwen_windows(config)
        return DecoderConfig.parse(
            config, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=windows
        )
