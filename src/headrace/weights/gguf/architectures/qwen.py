"""Qwen 2 and 3, dense and of experts. Converters leave values and rows as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from headrace.weights.gguf.architectures.base import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    HEAD_NORMS,
    Architecture,
)

_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


class Qwen2(Architecture):
    """Qwen 2 and 2.5. Windows, which no released model uses, are not in files."""

    def config(self) -> dict[str, Any]:
        return {**self.decoder_config("qwen2"), "use_sliding_window": False}


class Qwen3(Architecture):
    """Qwen 3, dense."""

    inside: ClassVar[Mapping[str, str]] = {**ATTENTION, **HEAD_NORMS, **FEED_FORWARD}

    def config(self) -> dict[str, Any]:
        bias = self.in_first_layer("attn_q.bias")
        return {
            **self.decoder_config("qwen3"),
            "attention_bias": bias,
            "use_sliding_window": False,
        }


class Qwen2Moe(Architecture):
    """Qwen2-MoE: the shares of the chosen experts stay as they are."""

    inside: ClassVar[Mapping[str, str]] = {**ATTENTION, **FEED_FORWARD, **EXPERTS, **_SHARED_EXPERT}

    def config(self) -> dict[str, Any]:
        shared = self.values.size("expert_shared_feed_forward_length", "feed_forward_length")
        return {
            **self.experts_config("qwen2_moe"),
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": shared,
        }

    def experts_config(self, model_type: str) -> dict[str, Any]:
        """What both Qwens with experts have."""
        values = self.values
        chosen = values.size("expert_used_count")
        derived = values.size("feed_forward_length") // chosen
        dense = [
            layer for layer in range(values.layers()) if f"blk.{layer}.ffn_up.weight" in values
        ]
        return {
            **self.decoder_config(model_type),
            "use_sliding_window": False,
            "num_experts": values.size("expert_count"),
            "num_experts_per_tok": chosen,
            "moe_intermediate_size": values.size("expert_feed_forward_length", default=derived),
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }


class Qwen3Moe(Qwen2Moe):
    """Qwen3-MoE: the shares of the chosen experts are made to sum to 1."""

    inside: ClassVar[Mapping[str, str]] = {**ATTENTION, **HEAD_NORMS, **FEED_FORWARD, **EXPERTS}

    def config(self) -> dict[str, Any]:
        return {
            **self.experts_config("qwen3_moe"),
            "norm_topk_prob": True,
            "attention_bias": self.in_first_layer("attn_q.bias"),
        }
