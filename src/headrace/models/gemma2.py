"""Gemma 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace.models.base import DecoderLayer, WeightSource
from headrace.models.layers.block import SandwichBlock
from headrace.models.layers.decoder import Decoder, DecoderConfig, Parts, read_windows
from headrace.models.layers.values import read_number, read_size
from headrace.ops.table import Ops


class Gemma(Decoder):
    """Norms on both sides of each half; the embedding is scaled, scores and logits are capped."""

    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        super().__init__(config, weights, ops)
        # Rounded like a weight, as the models were trained.
        scale = torch.tensor(self.parse(config).hidden ** 0.5, dtype=ops.dtype)
        self._scale = float(scale)
        self._softcap = _read_softcap(config, "final_logit_softcapping")

    @classmethod
    def block(cls, parts: Parts, index: int) -> DecoderLayer:
        prefix = f"{cls.root}layers.{index}."
        norms = [
            parts.norm(prefix + name)
            for name in (
                *("input_layernorm", "post_attention_layernorm"),
                *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            )
        ]
        return SandwichBlock(
            cls.mixer(parts, index, prefix + "self_attn."),
            (norms[0], norms[1]),
            cls.feed_forward(parts, index, prefix + "mlp."),
            (norms[2], norms[3]),
            parts.ops,
        )

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return super().embed(input_ids, positions) * self._scale

    def head(self, hidden: Tensor) -> Tensor:
        logits = super().head(hidden)
        if self._softcap is None:
            return logits
        return torch.tanh(logits / self._softcap) * self._softcap


def parse_gemma(
    config: dict[str, Any], windows: tuple[int | None, ...], **options: Any
) -> DecoderConfig:
    """What all Gemma models share; stored norm weights lack 1."""
    bias = bool(config.get("attention_bias", False))
    values = {
        "qkv_bias": bias,
        "output_bias": bias,
        "tied": bool(config.get("tie_word_embeddings", True)),
        "activation": config.get("hidden_activation") or "gelu_pytorch_tanh",
        "scale": read_number(config, "query_pre_attn_scalar", 256) ** -0.5,
        "softcap": _read_softcap(config, "attn_logit_softcapping"),
        "norm_offset": 1.0,
    }
    return DecoderConfig.parse(config, windows=windows, **{**values, **options})


def _read_softcap(config: dict[str, Any], name: str) -> float | None:
    return None if config.get(name) is None else read_number(config, name)


class Model(Gemma):
    """Every other layer, the first included, has a window."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        sliding = [index % 2 == 0 for index in range(read_size(config, "num_hidden_layers"))]
        return parse_gemma(config, read_windows(config, sliding=sliding))
