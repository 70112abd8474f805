"""gpt-oss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace.contracts.load_map import LoadMap, Rule
from headrace.models.base import WeightSource
from headrace.models.layers.decoder import Decoder, DecoderConfig, Parts, read_windows
from headrace.models.layers.experts import (
    MixtureOfExperts,
    Router,
    choose_then_softmax,
    read_chosen,
)
from headrace.models.layers.feed_forward import FeedForward
from headrace.models.layers.values import read_number, read_size
from headrace.ops.linear import RMSNorm


class Model(Decoder):
    """Every other layer has a window, all heads have a sink, every feed-forward is of experts."""

    # Experts lie in one tensor, [experts, columns, rows].
    load_map = LoadMap(
        Rule(r"(.*experts)\.(\d+)\.(\w+)\.weight", r"\1.\3", index=2, transposed=True),
        Rule(r"(.*experts)\.(\d+)\.(\w+)\.bias", r"\1.\3_bias", index=2),
    )

    @staticmethod
    def parse(config: dict[str, Any]) -> DecoderConfig:
        bias = bool(config.get("attention_bias", True))
        sliding = [index % 2 == 0 for index in range(read_size(config, "num_hidden_layers"))]
        windows = read_windows(config, sliding=sliding)
        return DecoderConfig.parse(config, qkv_bias=bias, output_bias=bias, windows=windows)

    @classmethod
    def feed_forward(cls, parts: Parts, index: int, prefix: str) -> FeedForward:
        raw, hidden, weights = parts.raw, parts.config.hidden, parts.weights
        count = read_size(raw, "num_local_experts")
        chosen = read_chosen(raw, count)
        router = Router(
            weights.tensor(prefix + "router.weight", (count, hidden)),
            choose_then_softmax(chosen),
            weights.tensor(prefix + "router.bias", (count,)),
        )
        limit, alpha = (
            read_number(raw, "swiglu_limit", 7.0),
            read_number(raw, "swiglu_alpha", 1.702),
        )
        experts = [
            ClampedFeedForward(
                *(f"{prefix}experts.{number}.", hidden, parts.config.intermediate, weights),
                *(limit, alpha),
            )
            for number in range(count)
        ]
        return MixtureOfExperts(router, experts, parts.ops.rms_norm)


class ClampedFeedForward:
    """A gated feed-forward whose parts are clamped (gpt-oss model card, section 2.3).

    Rows of gate and up are stored in turn.
    """

    gated = None

    def __init__(
        self,
        prefix: str,
        hidden: int,
        intermediate: int,
        weights: WeightSource,
        limit: float,
        alpha: float,
    ) -> None:
        self._limit, self._alpha = limit, alpha
        rows = 2 * intermediate
        order = [*range(0, rows, 2), *range(1, rows, 2)]
        self._gate_up = weights.linear(
            [prefix + "gate_up_proj"], [rows], hidden, bias=True, order=order, adaptable=False
        )
        self._down = weights.linear(
            [prefix + "down_proj"], [hidden], intermediate, bias=True, adaptable=False
        )

    def __call__(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See ``FeedForward``."""
        gate, up = self._gate_up(x, norm=norm).chunk(2, dim=-1)
        gate = gate.clamp(max=self._limit)
        up = up.clamp(-self._limit, self._limit)
        return self._down((up + 1) * gate * torch.sigmoid(gate * self._alpha), residual=residual)
