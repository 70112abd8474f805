"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B)."""

from __future__ import annotations

from typing import Any

from headrace.models.layers.decoder import Decoder, DecoderConfig, Parts, read_windows
from headrace.models.layers.experts import (
    MixtureOfExperts,
    Router,
    read_chosen,
    softmax_then_choose,
)
from headrace.models.layers.feed_forward import FeedForward, GatedFeedForward
from headrace.models.layers.values import read_count, read_list, read_size


class Model(Decoder):
    """Qwen2's attention; experts beside one, behind a gate, that works on every token."""

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        layers = read_size(config, "num_hidden_layers")
        most = read_count(config, "max_window_layers", layers)
        used = bool(config.get("use_sliding_window"))
        sliding = [used and index % 2 == 0 and index < most for index in range(layers)]
        windows = read_windows(config, sliding=sliding) if used else (None,) * layers
        return DecoderConfig.parse(config, qkv_bias=True, windows=windows)

    @classmethod
    def feed_forward(cls, parts: Parts, index: int, prefix: str) -> FeedForward:
        return qwen_experts(parts, index, prefix)


def qwen_experts(parts: Parts, index: int, prefix: str) -> FeedForward:
    """Experts as all Qwen models have them; some layers may be dense.

    Where ``shared_expert_intermediate_size`` is set, one expert works on every token.
    """
    raw, config, weights = parts.raw, parts.config, parts.weights

    def feed(name: str, intermediate: int, *, routed: bool = False) -> GatedFeedForward:
        return GatedFeedForward(
            *(name, config.hidden, intermediate, weights),
            activation=config.activation,
            adaptable=not routed,
        )

    step = read_size(raw, "decoder_sparse_step", 1)
    if index in (read_list(raw, "mlp_only_layers") or ()) or (index + 1) % step:
        return feed(prefix, config.intermediate)
    count = read_size(raw, "num_experts" if "num_experts" in raw else "num_local_experts")
    chosen = read_chosen(raw, count)
    width = read_size(raw, "moe_intermediate_size")
    router = weights.tensor(prefix + "gate.weight", (count, config.hidden))
    select = softmax_then_choose(chosen, normalized=bool(raw.get("norm_topk_prob", False)))
    experts = [feed(f"{prefix}experts.{number}.", width, routed=True) for number in range(count)]
    shared = gate = None
    if raw.get("shared_expert_intermediate_size"):
        shared = feed(prefix + "shared_expert.", read_size(raw, "shared_expert_intermediate_size"))
        gate = weights.tensor(prefix + "shared_expert_gate.weight", (1, config.hidden))[0]
    return MixtureOfExperts(Router(router, select), experts, parts.ops.rms_norm, shared, gate)
