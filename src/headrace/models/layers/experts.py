"""Mixtures of experts: a router, and the feed-forward layers that it chooses from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.models.layers.feed_forward import FeedForward
from headrace.models.layers.values import read_size
from headrace.ops.linear import RMSNorm

Selection = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Scores ``[T, experts]`` -> weights and numbers of the chosen experts, ``[T, k]``."""


class Router:
    """Which experts work on a token, and how much each counts; computed in fp32.

    Args:
        weight: ``[experts, hidden]``; bias: ``[experts]``.
        select: chooses by the scores.
    """

    def __init__(
        self,
        weight: Tensor,
        select: Selection,
        bias: Tensor | None = None,
    ) -> None:
        self._weight, self._select = weight.float(), select
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, hidden]`` -> weights in fp32 and numbers of experts, both ``[T, k]``."""
        return self._select(F.linear(x.float(), self._weight, self._bias))


def read_chosen(config: Mapping[str, Any], experts: int, default: int | None = None) -> int:
    """How many of the experts work on a token. Raises CheckpointError if it is more than all."""
    chosen = read_size(config, "num_experts_per_tok", default)
    if chosen > experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {chosen} exceeds the number of experts, {experts}"
        )
    return chosen


def softmax_then_choose(count: int, *, normalized: bool) -> Selection:
    """The ``count`` likeliest experts, their shares made to sum to 1 if ``normalized``."""

    def select(scores: Tensor) -> tuple[Tensor, Tensor]:
        shares, chosen = scores.softmax(-1).topk(count, dim=-1)
        return (shares / shares.sum(-1, keepdim=True) if normalized else shares), chosen

    return select


def choose_then_softmax(count: int) -> Selection:
    """The ``count`` experts with the highest scores, and the softmax of these."""

    def select(scores: Tensor) -> tuple[Tensor, Tensor]:
        highest, chosen = scores.topk(count, dim=-1)
        return highest.softmax(-1), chosen

    return select


class MixtureOfExperts:
    """Each token goes through the experts that its router chooses (Mixtral of Experts, 2.1).

    Args:
        shared: works on every token, beside the chosen ones (DeepSeekMoE, section 3.2).
        shared_gate: ``[hidden]``: the sigmoid of its product with a token weighs ``shared``.
    """

    gated = None

    def __init__(
        self,
        router: Router,
        experts: Sequence[FeedForward],
        rms_norm: Callable[[Tensor, Tensor, float], Tensor],
        shared: FeedForward | None = None,
        shared_gate: Tensor | None = None,
    ) -> None:
        self._router, self._experts, self._rms_norm = router, experts, rms_norm
        self._shared, self._shared_gate = shared, shared_gate

    def __call__(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See ``FeedForward``."""
        if norm is not None:
            x = self._rms_norm(x, norm.weight, norm.eps)
        weights, chosen = self._router(x)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if residual is not None:
            out += residual
        # Sorted by expert, each of them meets its tokens in one product.
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self._experts)).tolist()
        tokens, flat = order // chosen.shape[1], weights.flatten()
        place = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                rows = tokens[place : place + count]
                share = flat[order[place : place + count]].unsqueeze(1)
                out.index_add_(0, rows, expert(x[rows]).float() * share)
                place += count
        if self._shared is not None:
            part = self._shared(x).float()
            if self._shared_gate is not None:
                part *= torch.sigmoid(x.float() @ self._shared_gate.float()).unsqueeze(1)
            out += part
        return out.to(x.dtype)
