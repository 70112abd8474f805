"""Gemma 3, text."""

from __future__ import annotations

from typing import Any

from headrace.models.gemma2 import Gemma, parse_gemma
from headrace.models.layers.block import Mixer
from headrace.models.layers.decoder import DecoderConfig, Parts, decoder_attention, read_windows
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.models.layers.values import read_number, read_size


class Model(Gemma):
    """Gemma 2 with normed heads; five layers in six have a window, and frequencies of their own."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        pattern = read_size(config, "sliding_window_pattern", 6)
        layers = read_size(config, "num_hidden_layers")
        sliding = [(index + 1) % pattern != 0 for index in range(layers)]
        return parse_gemma(config, read_windows(config, sliding=sliding), qk_norm=True)

    @staticmethod
    def rotary(config: dict[str, Any], parsed: DecoderConfig) -> RotaryEmbedding:
        """Of the layers without a window."""
        values = {"rope_theta": 1e6, **config}
        return RotaryEmbedding.from_config(values, parsed.head_dim, "full_attention")

    @classmethod
    def mixer(cls, parts: Parts, index: int, prefix: str) -> Mixer:
        config, raw = parts.config, parts.raw
        rotary = parts.rotary
        if config.windows[index] is not None:
            theta = read_number(raw, "rope_local_base_freq", 10000.0)
            local = {**raw, "rope_theta": theta, "rope_scaling": None}
            rotary = RotaryEmbedding.from_config(local, config.head_dim, "sliding_attention")
        return decoder_attention(parts, index, prefix, rotary)
