"""GPT-2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.cache import LayerState, attention_state
from headrace.contracts.load_map import LoadMap, Rule
from headrace.errors import CheckpointError
from headrace.models.base import DecoderModel, ModelShape, WeightSource
from headrace.models.layers.attention import AttentionShape, SelfAttention
from headrace.models.layers.block import LayerNormBlock
from headrace.models.layers.feed_forward import PlainFeedForward
from headrace.models.layers.normalization import read_layer_norm
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.models.layers.values import read_head_width, read_number, read_size
from headrace.ops.paged import AttentionSpec
from headrace.ops.table import Ops


class Model(DecoderModel):
    """Learned positions, layer norms, and projections that are stored transposed."""

    rotary_attention = False
    load_map = LoadMap(
        Rule(r"(.*\.c_(?:attn|proj|fc)\.weight)", r"\1", transposed=True),
    )

    @classmethod
    def shape(cls, config: dict[str, Any]) -> ModelShape:
        return ModelShape(read_size(config, "n_positions"), read_size(config, "vocab_size"))

    @classmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        heads, width = read_size(config, "n_head"), read_head_width(config, "n_embd", "n_head")
        state = attention_state(heads, width, dtype)
        return [state] * read_size(config, "n_layer")

    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            if config.get(name):
                raise CheckpointError(f"config.json: {name} is not supported; only false")
        hidden, heads = read_size(config, "n_embd"), read_size(config, "n_head")
        vocab = read_size(config, "vocab_size")
        width = read_head_width(config, "n_embd", "n_head")
        inner = read_size(config, "n_inner", 4 * hidden)
        eps = read_number(config, "layer_norm_epsilon", 1e-5)
        root = "transformer." if "transformer.wte.weight" in weights else ""
        spec = AttentionSpec(width**-0.5 if config.get("scale_attn_weights", True) else 1.0)
        shape = AttentionShape(
            *(hidden, heads, heads, width, ("c_attn",), "c_proj"), bias=True, output_bias=True
        )
        self._head = weights.head(root + "wte", vocab, hidden)
        positions = read_size(config, "n_positions")
        self._positions = weights.embedding(root + "wpe", positions, hidden)
        self.layers = []
        for index in range(read_size(config, "n_layer")):
            prefix = f"{root}h.{index}."
            self.layers.append(
                LayerNormBlock(
                    SelfAttention(
                        *(index, prefix + "attn.", shape, spec, RotaryEmbedding.identity(width)),
                        *(weights, ops),
                    ),
                    read_layer_norm(weights, prefix + "ln_1", hidden, eps),
                    PlainFeedForward(
                        *(prefix + "mlp.c_fc", prefix + "mlp.c_proj", hidden, inner, weights),
                        config.get("activation_function", "gelu_new"),
                    ),
                    read_layer_norm(weights, prefix + "ln_2", hidden, eps),
                )
            )
        self._norm = read_layer_norm(weights, root + "ln_f", hidden, eps)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self._head.rows(input_ids) + self._positions(positions)

    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        return self._head(self._norm(hidden), out_dtype=torch.float32)
