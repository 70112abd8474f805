"""GPT-NeoX and Pythia."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.cache import LayerState, attention_state
from headrace.models.base import DecoderModel, ModelShape, WeightSource
from headrace.models.layers.attention import AttentionShape, SelfAttention
from headrace.models.layers.block import LayerNormBlock
from headrace.models.layers.feed_forward import PlainFeedForward
from headrace.models.layers.normalization import read_layer_norm
from headrace.models.layers.rotary import RotaryEmbedding, head_order, rotated_part
from headrace.models.layers.values import read_head_width, read_number, read_size
from headrace.ops.paged import AttentionSpec
from headrace.ops.table import Ops


class Model(DecoderModel):
    """Attention and feed-forward read the same stream; a quarter of each head is rotated."""

    @classmethod
    def shape(cls, config: dict[str, Any]) -> ModelShape:
        context = read_size(config, "max_position_embeddings", 2048)
        return ModelShape(context, read_size(config, "vocab_size"))

    @classmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        heads, width = read_size(config, "num_attention_heads"), read_head_width(config)
        state = attention_state(heads, width, dtype)
        return [state] * read_size(config, "num_hidden_layers")

    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        hidden, vocab = read_size(config, "hidden_size"), read_size(config, "vocab_size")
        heads, inner = (read_size(config, f) for f in ("num_attention_heads", "intermediate_size"))
        width, eps = read_head_width(config), read_number(config, "layer_norm_eps", 1e-5)
        rotated = rotated_part(config, width, read_number(config, "rotary_pct", 0.25))
        theta = config.get("rotary_emb_base")
        rotary = RotaryEmbedding.from_config(
            config if theta is None else {"rope_theta": theta, **config}, width, rotated=rotated
        )
        bias = bool(config.get("attention_bias", True))
        shape = AttentionShape(
            *(hidden, heads, heads, width, ("query_key_value",), "dense"),
            bias=bias,
            output_bias=bias,
            order=head_order(width, rotated),
            interleaved=True,
        )
        self._embed = weights.embedding("gpt_neox.embed_in", vocab, hidden)
        self.layers = []
        for index in range(read_size(config, "num_hidden_layers")):
            prefix = f"gpt_neox.layers.{index}."
            mlp = prefix + "mlp.dense_"
            spec = AttentionSpec(width**-0.5)
            self.layers.append(
                LayerNormBlock(
                    SelfAttention(index, prefix + "attention.", shape, spec, rotary, weights, ops),
                    read_layer_norm(weights, prefix + "input_layernorm", hidden, eps),
                    PlainFeedForward(
                        *(mlp + "h_to_4h", mlp + "4h_to_h", hidden, inner, weights),
                        config.get("hidden_act", "gelu"),
                    ),
                    read_layer_norm(weights, prefix + "post_attention_layernorm", hidden, eps),
                    parallel=bool(config.get("use_parallel_residual", True)),
                )
            )
        self._norm = read_layer_norm(weights, "gpt_neox.final_layer_norm", hidden, eps)
        tied = bool(config.get("tie_word_embeddings", False))
        self._head = weights.head("gpt_neox.embed_in" if tied else "embed_out", vocab, hidden)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self._embed(input_ids)

    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        return self._head(self._norm(hidden), out_dtype=torch.float32)
