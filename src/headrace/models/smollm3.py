"""SmolLM3: some layers know no positions."""

from __future__ import annotations

from typing import Any

from headrace.errors import CheckpointError
from headrace.models.layers.block import Mixer
from headrace.models.layers.decoder import (
    Decoder,
    DecoderConfig,
    Parts,
    decoder_attention,
    read_windows,
)
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.models.layers.values import read_list, read_size


class Model(Decoder):
    """Llama's shape; layers whose entry in ``no_rope_layers`` is 0 do without RoPE."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        bias, mlp_bias = (bool(config.get(name)) for name in ("attention_bias", "mlp_bias"))
        sliding = [bool(config.get("use_sliding_window")) and not r for r in _rotates(config)]
        return DecoderConfig.parse(
            config,
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=mlp_bias,
            windows=read_windows(config, sliding=sliding),
        )

    @classmethod
    def mixer(cls, parts: Parts, index: int, prefix: str) -> Mixer:
        rotary = parts.rotary
        if not _rotates(parts.raw)[index]:
            rotary = RotaryEmbedding.identity(parts.config.head_dim)
        return decoder_attention(parts, index, prefix, rotary)


def _rotates(config: dict[str, Any]) -> list[bool]:
    """Which layers have RoPE; by default all but every fourth."""
    listed, layers = read_list(config, "no_rope_layers"), read_size(config, "num_hidden_layers")
    if listed is None:
        interval = read_size(config, "no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(layers)]
    if len(listed) != layers:
        raise CheckpointError(f"config.json: no_rope_layers must be for {layers} layers: {listed}")
    return [bool(entry) for entry in listed]
