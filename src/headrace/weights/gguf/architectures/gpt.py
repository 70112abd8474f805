"""GPT-2 and GPT-NeoX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from headrace.weights.gguf.architectures.base import Architecture
from headrace.weights.gguf.architectures.rope import read_rope
from headrace.weights.gguf.recipes import Matrix, Piece, head_by_head


class Gpt2(Architecture):
    """Converters transpose the projections, which the original stores with columns first."""

    outside: ClassVar[Mapping[str, str]] = {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    }
    inside: ClassVar[Mapping[str, str]] = {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    layer = "transformer.h.{}."

    def matrix(self, key: str, piece: Piece) -> Matrix:
        stem, _, ending = key.rpartition(".")
        if ending != "weight" or stem not in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
            return Matrix((piece,))
        self.values.check_shape(piece.tensor, 2)
        return Matrix((piece,), transposed=True)

    def config(self) -> dict[str, Any]:
        values = self.values
        return {
            "model_type": "gpt2",
            **values.general(),
            "n_positions": values.size("context_length"),
            "n_embd": values.size("embedding_length"),
            "n_inner": values.size("feed_forward_length"),
            "n_layer": values.layers(),
            "n_head": values.heads(),
            "layer_norm_epsilon": values.number("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }


class GptNeoX(Architecture):
    """GPT-NeoX and Pythia.

    Converters sort the rows of the fused projection: first the queries of all heads, then their
    keys, then their values. In the original they come head by head.
    """

    outside: ClassVar[Mapping[str, str]] = {
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "embed_out",
    }
    inside: ClassVar[Mapping[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    }
    layer = "gpt_neox.layers.{}."

    def matrix(self, key: str, piece: Piece) -> Matrix:
        if not key.startswith("attn_qkv."):
            return Matrix((piece,))
        heads, weight = self.values.heads(), key.endswith(".weight")
        self.values.check_shape(piece.tensor, 2 if weight else 1, multiple_of=3 * heads)
        return Matrix((piece,), order=head_by_head(3, heads))

    def config(self) -> dict[str, Any]:
        values = self.values
        rope = read_rope(values, self.head_width(), partial=True)
        return {
            "model_type": "gpt_neox",
            **values.general(),
            "hidden_size": values.size("embedding_length"),
            "intermediate_size": values.size("feed_forward_length"),
            "num_hidden_layers": values.layers(),
            "num_attention_heads": values.heads(),
            "layer_norm_eps": values.number("attention.layer_norm_epsilon"),
            "use_parallel_residual": values.flag("use_parallel_residual", True),
            "attention_bias": self.in_first_layer("attn_qkv.bias"),
            "hidden_act": "gelu",
            "rotary_pct": rope.get("partial_rotary_factor", 1.0),
            **rope,
        }
