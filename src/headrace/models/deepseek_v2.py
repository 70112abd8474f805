"""DeepSeek-V2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from headrace.contracts.cache import LayerState
from headrace.errors import CheckpointError
from headrace.models.layers.block import Mixer
from headrace.models.layers.decoder import Decoder, DecoderConfig, Parts
from headrace.models.layers.experts import MixtureOfExperts, Router, Selection, read_chosen
from headrace.models.layers.feed_forward import FeedForward, GatedFeedForward
from headrace.models.layers.latent_attention import LatentAttention, LatentShape
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.models.layers.values import read_count, read_number, read_size


class Model(Decoder):
    """Latent attention; behind the first layers, experts of which groups are chosen first."""

    rotary_attention = False

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        return DecoderConfig.parse(config, head_dim=read_size(config, "qk_rope_head_dim"))

    @staticmethod
    def latent_shape(config: dict[str, Any]) -> LatentShape:
        """Sizes of attention."""
        return LatentShape.parse(config, interleaved=True)

    @staticmethod
    def rotary(config: dict[str, Any], parsed: DecoderConfig) -> RotaryEmbedding:
        return RotaryEmbedding.from_config(config, parsed.head_dim, rotated=parsed.head_dim)

    @classmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        if dtype == "int8":
            raise CheckpointError("kv_cache_dtype: int8 does not serve latent attention; use auto")
        return [cls.latent_shape(config).state(dtype)] * read_size(config, "num_hidden_layers")

    @classmethod
    def mixer(cls, parts: Parts, index: int, prefix: str) -> Mixer:
        shape = cls.latent_shape(parts.raw)
        return LatentAttention(index, prefix, shape, parts.rotary, parts.weights, parts.ops)

    @classmethod
    def feed_forward(cls, parts: Parts, index: int, prefix: str) -> FeedForward:
        raw, config, weights = parts.raw, parts.config, parts.weights

        def feed(name: str, intermediate: int, *, routed: bool = False) -> GatedFeedForward:
            return GatedFeedForward(
                *(name, config.hidden, intermediate, weights),
                activation=config.activation,
                adaptable=not routed,
            )

        if index < read_count(raw, "first_k_dense_replace"):
            return feed(prefix, config.intermediate)
        count, width = read_size(raw, "n_routed_experts"), read_size(raw, "moe_intermediate_size")
        gate = weights.tensor(prefix + "gate.weight", (count, config.hidden))
        experts = [
            feed(f"{prefix}experts.{number}.", width, routed=True) for number in range(count)
        ]
        shared = None
        beside = read_count(raw, "n_shared_experts")
        if beside:
            shared = feed(prefix + "shared_experts.", width * beside)
        router = Router(gate, cls.selection(parts, prefix))
        return MixtureOfExperts(router, experts, parts.ops.rms_norm, shared)

    @classmethod
    def selection(cls, parts: Parts, prefix: str) -> Selection:
        """The likeliest experts, of the groups whose best expert is likeliest (section 2.2.2)."""
        raw = parts.raw
        experts = read_size(raw, "n_routed_experts")
        count, factor = read_chosen(raw, experts), read_number(raw, "routed_scaling_factor", 1.0)
        method = raw.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise CheckpointError(f"config.json: topk_method {method!r} is not supported")
        groups, kept = read_groups(raw, experts) if method != "greedy" else (1, 1)

        def select(scores: Tensor) -> tuple[Tensor, Tensor]:
            shares = scores.softmax(-1)
            best = shares.unflatten(1, (groups, -1)).amax(-1)
            shares = keep_groups(shares, best, kept, hidden=0.0)
            weights, chosen = shares.topk(count, dim=-1)
            return weights * factor, chosen

        return select


def read_groups(config: dict[str, Any], experts: int) -> tuple[int, int]:
    """Groups of experts, and how many of them are kept. Raises CheckpointError."""
    groups, kept = read_size(config, "n_group", 1), read_size(config, "topk_group", 1)
    if experts % groups or kept > groups:
        raise CheckpointError(
            f"config.json: n_group {groups} must divide the {experts} experts, and topk_group "
            f"{kept} not exceed it"
        )
    return groups, kept


def keep_groups(scores: Tensor, of_groups: Tensor, kept: int, hidden: float) -> Tensor:
    """``scores`` ``[T, experts]`` with ``hidden`` in all but the ``kept`` best groups."""
    chosen = of_groups.topk(kept, dim=-1).indices
    open_ = of_groups.new_zeros(of_groups.shape).scatter_(1, chosen, 1.0).bool()
    size = scores.shape[1] // of_groups.shape[1]
    return scores.masked_fill(~open_.repeat_interleave(size, dim=1), hidden)
