"""Mistral."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.decoder import Decoder, DecoderConfig, read_windows


class Model(Decoder):
    """Llama's shape; where ``sliding_window`` is set, all layers have it."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        return DecoderConfig.parse(config, windows=read_windows(config, sliding=True))
