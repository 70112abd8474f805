"""Phi-3, Phi-3.5 and Phi-4-mini. Converters leave the fused projections as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from headrace.weights.gguf.architectures.base import Architecture


class Phi3(Architecture):
    """A window of 0 stands for none."""

    inside: ClassVar[Mapping[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }

    def config(self) -> dict[str, Any]:
        window = self.values.count("attention.sliding_window", default=0)
        return {
            **self.decoder_config("phi3", partial_rope=True),
            "sliding_window": window or None,
        }
