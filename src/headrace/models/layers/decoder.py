"""The pre-norm decoder block that Llama made common, and a model made of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.cache import CacheLayout, attention_layout
from headrace.errors import CheckpointError
from headrace.models.base import (
    AttentionContext,
    DecoderLayer,
    DecoderModel,
    Embedding,
    ModelShape,
    WeightSource,
)
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.models.layers.values import read_number, read_size
from headrace.ops.linear import RMSNorm
from headrace.ops.table import Ops


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and options of a dense decoder with grouped-query attention and SwiGLU."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def parse(cls, config: dict[str, Any], **options: bool) -> DecoderConfig:
        """Out of ``config.json``. Raises CheckpointError naming what is missing or unsupported."""
        heads = read_size(config, "num_attention_heads")
        hidden = read_size(config, "hidden_size")
        parsed = cls(
            vocab_size=read_size(config, "vocab_size"),
            hidden=hidden,
            intermediate=read_size(config, "intermediate_size"),
            layers=read_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=read_size(config, "num_key_value_heads", heads),
            head_dim=read_size(config, "head_dim", hidden // heads),
            context=read_size(config, "max_position_embeddings", 2048),
            norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            tied=bool(config.get("tie_word_embeddings", False)),
            **options,
        )
        if heads % parsed.kv_heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads {parsed.kv_heads} must divide "
                f"num_attention_heads {heads}"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise CheckpointError(
                f"config.json: hidden_act {config['hidden_act']!r} is not supported; only silu"
            )
        if config.get("use_sliding_window"):
            raise CheckpointError(
                "config.json: use_sliding_window is not supported; set it to false"
            )
        return parsed


class AttentionBlock(DecoderLayer):
    """Attention and feed-forward, each behind an RMS norm and added to the stream."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        rotary: RotaryEmbedding,
        weights: WeightSource,
        ops: Ops,
    ) -> None:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        width, hidden = config.head_dim, config.hidden
        heads, kv_heads = config.heads, config.kv_heads
        self._index, self._rotary, self._ops = index, rotary, ops
        self._heads, self._kv_heads, self._width = heads, kv_heads, width
        self._eps = config.norm_eps
        self._input_norm = read_norm(weights, config, prefix + "input_layernorm")
        self._qkv = weights.linear(
            [attention + name for name in ("q_proj", "k_proj", "v_proj")],
            [heads * width, kv_heads * width, kv_heads * width],
            hidden,
            bias=config.qkv_bias,
        )
        self._q_norm = self._k_norm = None
        if config.qk_norm:
            self._q_norm = weights.vector(attention + "q_norm.weight", width)
            self._k_norm = weights.vector(attention + "k_norm.weight", width)
        self._output = weights.linear(
            [attention + "o_proj"], [hidden], heads * width, bias=config.output_bias
        )
        self._post_norm = read_norm(weights, config, prefix + "post_attention_layernorm")
        self._gate_up = weights.linear(
            [mlp + "gate_proj", mlp + "up_proj"],
            [config.intermediate] * 2,
            hidden,
            bias=config.mlp_bias,
            gated=True,
        )
        self._down = weights.linear(
            [mlp + "down_proj"], [hidden], config.intermediate, bias=config.mlp_bias
        )

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        qkv = self._qkv(hidden, norm=self._input_norm).view(len(hidden), -1, self._width)
        q, k, v = qkv.split([self._heads, self._kv_heads, self._kv_heads], dim=1)
        if self._q_norm is not None and self._k_norm is not None:
            q = self._ops.rms_norm(q, self._q_norm, self._eps)
            k = self._ops.rms_norm(k, self._k_norm, self._eps)
        attended = context.attend(self._index, q, k, v, self._rotary, self._width**-0.5)
        return self._output(attended, residual=hidden)

    def feed(self, hidden: Tensor) -> Tensor:
        return self._down(self._gate_up(hidden, norm=self._post_norm), residual=hidden)


def read_norm(weights: WeightSource, config: DecoderConfig, name: str) -> RMSNorm:
    """The norm of a hidden state whose weight is ``name + ".weight"``."""
    return RMSNorm(weights.vector(name + ".weight", config.hidden), config.norm_eps)


class DenseDecoder(DecoderModel):
    """Embedding, blocks, final norm and output head (the embedding's transpose if tied)."""

    @staticmethod
    @abstractmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        """What the architecture makes of ``config.json``."""

    @classmethod
    def shape(cls, config: dict[str, Any]) -> ModelShape:
        parsed = cls.parse(config)
        return ModelShape(
            parsed.layers, parsed.kv_heads, parsed.head_dim, parsed.context, parsed.vocab_size
        )

    @classmethod
    def cache_layout(cls, config: dict[str, Any], dtype: str, block_size: int) -> CacheLayout:
        parsed = cls.parse(config)
        return attention_layout(
            layers=parsed.layers,
            kv_heads=parsed.kv_heads,
            head_dim=parsed.head_dim,
            dtype=dtype,
            block_size=block_size,
        )

    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        parsed = self.parse(config)
        rotary = RotaryEmbedding.from_config(config, parsed.head_dim)
        vocab, hidden = parsed.vocab_size, parsed.hidden
        embedding = "model.embed_tokens"
        if parsed.tied:
            self._head = weights.head(embedding, vocab, hidden)
            self._embed: Embedding = self._head.rows
        else:
            self._embed = weights.embedding(embedding, vocab, hidden)
        self.layers: Sequence[DecoderLayer] = [
            AttentionBlock(parsed, index, rotary, weights, ops) for index in range(parsed.layers)
        ]
        self._norm = read_norm(weights, parsed, "model.norm")
        if not parsed.tied:
            self._head = weights.head("lm_head", vocab, hidden)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self._embed(input_ids)

    def head(self, hidden: Tensor) -> Tensor:
        return self._head(hidden, norm=self._norm, out_dtype=torch.float32)
