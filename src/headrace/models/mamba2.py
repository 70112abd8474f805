"""Mamba-2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.cache import LayerState
from headrace.models.base import DecoderModel, Embedding, ModelShape, WeightSource
from headrace.models.layers.block import MixerBlock
from headrace.models.layers.mamba import MambaMixer, MambaShape
from headrace.models.layers.normalization import read_rms_norm
from headrace.models.layers.values import read_interval, read_number, read_size
from headrace.ops.table import Ops

CONTEXT = 1 << 20
"""There is no limit of the model's own."""


class Model(DecoderModel):
    """Layers of mixers alone; what a sequence keeps does not grow with it."""

    @classmethod
    def shape(cls, config: dict[str, Any]) -> ModelShape:
        context = read_size(config, "max_position_embeddings", CONTEXT)
        return ModelShape(context, read_size(config, "vocab_size"))

    @classmethod
    def layer_states(cls, config: dict[str, Any], dtype: str) -> Sequence[LayerState]:
        state = LayerState(_mixer_shape(config).planes())
        return [state] * read_size(config, "num_hidden_layers")

    def __init__(self, config: dict[str, Any], weights: WeightSource, ops: Ops) -> None:
        shape, vocab = _mixer_shape(config), read_size(config, "vocab_size")
        eps = read_number(config, "layer_norm_epsilon", 1e-5)
        tied = bool(config.get("tie_word_embeddings", False))
        if tied:
            self._head = weights.head("backbone.embeddings", vocab, shape.hidden)
            self._embed: Embedding = self._head.rows
        else:
            self._embed = weights.embedding("backbone.embeddings", vocab, shape.hidden)
        self.layers = []
        for index in range(read_size(config, "num_hidden_layers")):
            prefix = f"backbone.layers.{index}."
            norm = read_rms_norm(weights, prefix + "norm", shape.hidden, eps)
            mixer = MambaMixer(index, prefix + "mixer.", shape, weights)
            self.layers.append(MixerBlock(mixer, norm))
        self._norm, self._ops = read_rms_norm(weights, "backbone.norm_f", shape.hidden, eps), ops
        if not tied:
            self._head = weights.head("lm_head", vocab, shape.hidden)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self._embed(input_ids)

    def norm(self, hidden: Tensor) -> Tensor:
        return self._ops.rms_norm(hidden, self._norm.weight, self._norm.eps)

    def head(self, hidden: Tensor) -> Tensor:
        return self._head(hidden, norm=self._norm, out_dtype=torch.float32)


def _mixer_shape(config: dict[str, Any]) -> MambaShape:
    hidden = read_size(config, "hidden_size")
    bias = bool(config.get("use_bias", False))
    return MambaShape(
        hidden=hidden,
        inner=int(read_number(config, "expand", 2) * hidden),
        heads=read_size(config, "num_heads", 128),
        groups=read_size(config, "n_groups", 8),
        state=read_size(config, "state_size", 128),
        kernel=read_size(config, "conv_kernel", 4),
        bias=bias,
        convolution_bias=bool(config.get("use_conv_bias", True)),
        output_bias=bias,
        step_limit=read_interval(config, "time_step_limit"),
        norm_eps=read_number(config, "layer_norm_epsilon", 1e-5),
    )
