"""BERT and the many embedders that have its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from headrace.contracts.cache import LayerState, attention_state
from headrace.errors import CheckpointError
from headrace.models.base import DecoderModel, ModelShape, WeightSource
from headrace.models.layers.attention import AttentionShape, SelfAttention
from headrace.models.layers.block import PostNormBlock
from headrace.models.layers.feed_forward import PlainFeedForward
from headrace.models.layers.normalization import read_layer_norm
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.models.layers.values import read_head_width, read_number, read_size
from headrace.ops.paged import AttentionSpec
from headrace.ops.table import Ops


class Model(DecoderModel):
    """Every token sees all others; there are embeddings and no logits."""

    causal = False
    rotary_attention = False
    root = "bert."
    """Of the names of all tensors, where a checkpoint has it."""
    first_position = 0
    """Of the table of positions: the row of a text's first token."""

    @classmethod
    def shape(cls, config: dict[str, Any]) -> ModelShape:
        context = read_size(config, "max_position_embeddings") - cls.first_position
        return ModelShape(context, read_size(config, "vocab_size"))

    @classmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        heads, width = read_size(config, "num_attention_heads"), read_head_width(config)
        state = attention_state(heads, width, dtype)
        return [state] * read_size(config, "num_hidden_layers")

    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        kind = config.get("position_embedding_type") or "absolute"
        if kind != "absolute":
            raise CheckpointError(f"config.json: position_embedding_type {kind!r} is not supported")
        hidden, heads = (read_size(config, name) for name in ("hidden_size", "num_attention_heads"))
        width, eps = read_head_width(config), read_number(config, "layer_norm_eps", 1e-12)
        inner, vocab = (read_size(config, name) for name in ("intermediate_size", "vocab_size"))
        words = "embeddings.word_embeddings.weight"
        root = self.root if self.root + words in weights else ""
        embeddings = root + "embeddings."
        self._words = weights.embedding(embeddings + "word_embeddings", vocab, hidden)
        positions = read_size(config, "max_position_embeddings")
        self._positions = weights.embedding(embeddings + "position_embeddings", positions, hidden)
        kinds = read_size(config, "type_vocab_size", 2)
        table = weights.tensor(embeddings + "token_type_embeddings.weight", (kinds, hidden))
        self._kind = table[0]
        self._norm = read_layer_norm(weights, embeddings + "LayerNorm", hidden, eps)
        projections = tuple(f"self.{name}" for name in ("query", "key", "value"))
        shape = AttentionShape(
            *(hidden, heads, heads, width, projections, "output.dense"), bias=True, output_bias=True
        )
        spec, upright = AttentionSpec(width**-0.5, causal=False), RotaryEmbedding.identity(width)
        self.layers = []
        for index in range(read_size(config, "num_hidden_layers")):
            prefix = f"{root}encoder.layer.{index}."
            attention = prefix + "attention."
            self.layers.append(
                PostNormBlock(
                    SelfAttention(index, attention, shape, spec, upright, weights, ops),
                    read_layer_norm(weights, attention + "output.LayerNorm", hidden, eps),
                    PlainFeedForward(
                        *(prefix + "intermediate.dense", prefix + "output.dense", hidden, inner),
                        weights,
                        config.get("hidden_act", "gelu"),
                    ),
                    read_layer_norm(weights, prefix + "output.LayerNorm", hidden, eps),
                )
            )

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        places = self._positions(positions + self.first_position)
        return self._norm(self._words(input_ids) + places + self._kind)

    def norm(self, hidden: Tensor) -> Tensor:
        return hidden

    def head(self, hidden: Tensor) -> NoReturn:
        raise RuntimeError("the model makes embeddings, and no logits")
