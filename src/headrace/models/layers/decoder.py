"""A decoder as Llama made it common, of which most architectures change a part or two."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.cache import LayerState, attention_state
from headrace.errors import CheckpointError
from headrace.models.base import (
    DecoderLayer,
    DecoderModel,
    Embedding,
    ModelShape,
    WeightSource,
)
from headrace.models.layers.attention import AttentionShape, SelfAttention
from headrace.models.layers.block import Mixer, PreNormBlock
from headrace.models.layers.feed_forward import FeedForward, GatedFeedForward
from headrace.models.layers.normalization import read_rms_norm
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.models.layers.values import (
    read_head_width,
    read_layer_kinds,
    read_number,
    read_size,
)
from headrace.ops.linear import RMSNorm
from headrace.ops.paged import AttentionSpec
from headrace.ops.table import Ops


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and options of a decoder with grouped-query attention and a gated feed-forward.

    Args:
        windows: of each layer; ``None`` where all is seen.
        norm_offset: what stored norm weights lack.
    """

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
    windows: tuple[int | None, ...]
    activation: object = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    softcap: float | None = None
    norm_offset: float = 0.0

    @classmethod
    def parse(cls, config: dict[str, Any], **options: Any) -> DecoderConfig:
        """Out of ``config.json``. Raises CheckpointError naming what is missing or unsupported."""
        heads = read_size(config, "num_attention_heads")
        hidden = read_size(config, "hidden_size")
        layers = read_size(config, "num_hidden_layers")
        values = {
            "vocab_size": read_size(config, "vocab_size"),
            "hidden": hidden,
            "intermediate": read_size(config, "intermediate_size"),
            "layers": layers,
            "heads": heads,
            "kv_heads": read_size(config, "num_key_value_heads", heads),
            "head_dim": (
                read_head_width(config)
                if config.get("head_dim") is None
                else read_size(config, "head_dim")
            ),
            "context": read_size(config, "max_position_embeddings", 2048),
            "norm_eps": read_number(config, "rms_norm_eps", 1e-6),
            "tied": bool(config.get("tie_word_embeddings", False)),
            "activation": config.get("hidden_act", "silu"),
            "windows": (None,) * layers,
        }
        parsed = cls(**{**values, **options})
        if heads % parsed.kv_heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads {parsed.kv_heads} must divide "
                f"num_attention_heads {heads}"
            )
        return parsed


def read_windows(
    config: dict[str, Any], *, sliding: Sequence[bool] | bool = False
) -> tuple[int | None, ...]:
    """The window of each layer: of those that ``layer_types`` names so, else of ``sliding`` ones.

    Raises:
        CheckpointError: there are windows, and ``sliding_window`` does not say how wide; or
            ``layer_types`` is wrong.
    """
    layers = read_size(config, "num_hidden_layers")
    kinds = read_layer_kinds(config, "full_attention", "sliding_attention")
    if kinds is not None:
        slides = [kind == "sliding_attention" for kind in kinds]
    else:
        slides = [sliding] * layers if isinstance(sliding, bool) else list(sliding)
    if config.get("sliding_window") is None or not any(slides):
        return (None,) * layers
    window = read_size(config, "sliding_window")
    return tuple(window if slide else None for slide in slides)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the layers of a model are made from.

    Args:
        raw: ``config.json``; config: what the architecture made of it.
    """

    raw: dict[str, Any]
    config: DecoderConfig
    weights: WeightSource
    ops: Ops
    rotary: RotaryEmbedding

    def norm(self, name: str, size: int | None = None) -> RMSNorm:
        """The norm whose weight is ``name + ".weight"``, of a hidden state by default."""
        config = self.config
        width = config.hidden if size is None else size
        return read_rms_norm(self.weights, name, width, config.norm_eps, config.norm_offset)


class Decoder(DecoderModel):
    """Embedding, blocks, final norm and output head (the embedding's transpose if tied)."""

    root = "model."
    """Of the names of all tensors but the head's."""
    last_norm = "norm"

    @staticmethod
    @abstractmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        """What the architecture makes of ``config.json``."""

    @classmethod
    def shape(cls, config: dict[str, Any]) -> ModelShape:
        parsed = cls.parse(config)
        return ModelShape(parsed.context, parsed.vocab_size)

    @classmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        parsed = cls.parse(config)
        return [
            attention_state(parsed.kv_heads, parsed.head_dim, dtype, window)
            for window in parsed.windows
        ]

    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        parsed = self.parse(config)
        rotary = self.rotary(config, parsed)
        parts = Parts(config, parsed, weights, ops, rotary)
        vocab, hidden = parsed.vocab_size, parsed.hidden
        embedding = self.root + "embed_tokens"
        if parsed.tied:
            self._head = weights.head(embedding, vocab, hidden)
            self._embed: Embedding = self._head.rows
        else:
            self._embed = weights.embedding(embedding, vocab, hidden)
        self.layers: Sequence[DecoderLayer] = [
            self.block(parts, index) for index in range(parsed.layers)
        ]
        self._norm, self._ops = parts.norm(self.root + self.last_norm), ops
        if not parsed.tied:
            self._head = weights.head("lm_head", vocab, hidden)

    @staticmethod
    def rotary(config: dict[str, Any], parsed: DecoderConfig) -> RotaryEmbedding:
        """The positions of most layers."""
        return RotaryEmbedding.from_config(config, parsed.head_dim)

    @classmethod
    def block(cls, parts: Parts, index: int) -> DecoderLayer:
        """One layer."""
        prefix = f"{cls.root}layers.{index}."
        return PreNormBlock(
            cls.mixer(parts, index, prefix + "self_attn."),
            parts.norm(prefix + "input_layernorm"),
            cls.feed_forward(parts, index, prefix + "mlp."),
            parts.norm(prefix + "post_attention_layernorm"),
        )

    @classmethod
    def mixer(cls, parts: Parts, index: int, prefix: str) -> Mixer:
        """What exchanges between the tokens of layer ``index``."""
        return decoder_attention(parts, index, prefix, parts.rotary)

    @classmethod
    def feed_forward(cls, parts: Parts, index: int, prefix: str) -> FeedForward:
        """What works on the tokens of layer ``index``."""
        config = parts.config
        return GatedFeedForward(
            prefix,
            config.hidden,
            config.intermediate,
            parts.weights,
            activation=config.activation,
            bias=config.mlp_bias,
        )

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self._embed(input_ids)

    def norm(self, hidden: Tensor) -> Tensor:
        return self._ops.rms_norm(hidden, self._norm.weight, self._norm.eps)

    def head(self, hidden: Tensor) -> Tensor:
        return self._head(hidden, norm=self._norm, out_dtype=torch.float32)


def decoder_attention(
    parts: Parts, index: int, prefix: str, rotary: RotaryEmbedding, **options: Any
) -> SelfAttention:
    """Attention as a ``DecoderConfig`` describes it; ``options`` are of ``AttentionShape``."""
    config = parts.config
    sizes = (config.hidden, config.heads, config.kv_heads, config.head_dim)
    shape = AttentionShape(
        *sizes, **{"bias": config.qkv_bias, "output_bias": config.output_bias, **options}
    )
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    head_norms = None
    if config.qk_norm:
        for_q, for_k = (
            _ordered(parts.norm(prefix + name, config.head_dim), shape.order)
            for name in ("q_norm", "k_norm")
        )
        head_norms = for_q, for_k
    sinks = f"{prefix}sinks"
    return SelfAttention(
        index,
        prefix,
        shape,
        AttentionSpec(scale, config.windows[index], config.softcap),
        rotary,
        parts.weights,
        parts.ops,
        head_norms=head_norms,
        sinks=parts.weights.vector(sinks, config.heads) if sinks in parts.weights else None,
    )


def _ordered(norm: RMSNorm, order: Sequence[int] | None) -> RMSNorm:
    if order is None:
        return norm
    places = torch.tensor(order, device=norm.weight.device)
    return RMSNorm(norm.weight[places], norm.eps)
