"""Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.decoder import Decoder, DecoderConfig, read_windows
from headrace.models.layers.values import read_count, read_size


class Model(Decoder):
    """Llama's shape with biases on the query, key and value projections."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        return DecoderConfig.parse(config, qkv_bias=True, windows=qwen_windows(config))


def qwen_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Windows, if ``use_sliding_window`` is set: of the layers from ``max_window_layers`` on."""
    layers = read_size(config, "num_hidden_layers")
    if not config.get("use_sliding_window"):
        return (None,) * layers
    first = read_count(config, "max_window_layers", layers)
    return read_windows(config, sliding=[index >= first for index in range(layers)])
