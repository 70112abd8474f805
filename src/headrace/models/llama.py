"""Llama 2 and 3.x, and the many checkpoints that share their shape."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.decoder import Decoder, DecoderConfig


class Model(Decoder):
    """``attention_bias`` covers all four projections of attention, ``mlp_bias`` all three."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        bias = bool(config.get("attention_bias", False))
        mlp_bias = bool(config.get("mlp_bias", False))
        return DecoderConfig.parse(config, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)
