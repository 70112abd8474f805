"""Qwen3, dense."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.decoder import DecoderConfig, DenseDecoder


class Model(DenseDecoder):
    """Llama's shape with an RMS norm on every query and key head."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        bias = bool(config.get("attention_bias", False))
        return DecoderConfig.parse(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
