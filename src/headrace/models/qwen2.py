"""Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.decoder import DecoderConfig, DenseDecoder


class Model(DenseDecoder):
    """Llama's shape with biases on the query, key and value projections."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        return DecoderConfig.parse(config, qkv_bias=True)
