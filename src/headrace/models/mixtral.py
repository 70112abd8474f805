"""Mixtral."""

from __future__ import annotations

from typing import Any

from headrace.contracts.load_map import LoadMap, Rule
from headrace.models.layers.decoder import Decoder, DecoderConfig, Parts, read_windows
from headrace.models.layers.experts import (
    MixtureOfExperts,
    Router,
    read_chosen,
    softmax_then_choose,
)
from headrace.models.layers.feed_forward import FeedForward, GatedFeedForward
from headrace.models.layers.values import read_size


class Model(Decoder):
    """Mistral's shape; of ``num_local_experts``, ``num_experts_per_tok`` work on each token."""

    load_map = LoadMap(Rule(r"(.*\.)mlp\.(.*)", r"\1block_sparse_moe.\2"))

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        return DecoderConfig.parse(config, windows=read_windows(config, sliding=True))

    @classmethod
    def feed_forward(cls, parts: Parts, index: int, prefix: str) -> FeedForward:
        config, weights = parts.config, parts.weights
        count = read_size(parts.raw, "num_local_experts")
        chosen = read_chosen(parts.raw, count, 2)
        router = weights.tensor(prefix + "gate.weight", (count, config.hidden))
        experts = [
            GatedFeedForward(
                f"{prefix}experts.{expert}.",
                config.hidden,
                config.intermediate,
                weights,
                names=("w1", "w3"),
                down="w2",
                activation=config.activation,
                adaptable=False,
            )
            for expert in range(count)
        ]
        select = softmax_then_choose(chosen, normalized=True)
        return MixtureOfExperts(Router(router, select), experts, parts.ops.rms_norm)
