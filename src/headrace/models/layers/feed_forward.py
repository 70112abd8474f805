"""Feed-forward layers: work on each token alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.models.base import WeightSource
from headrace.ops.linear import RMSNorm


class FeedForward(Protocol):
    """Work on each token alone."""

    def __call__(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """``norm(x)`` worked on, ``[T, hidden]``, and added to ``residual``."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": F.relu,
}
"""Name in ``config.json`` -> function (Gaussian Error Linear Units; its approximation by tanh)."""


def find_activation(name: object) -> Callable[[Tensor], Tensor]:
    """The function of that name. Raises CheckpointError that lists the known ones."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: activation {name!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


class GatedFeedForward:
    """``down(activation(gate(x)) * up(x))`` (GLU Variants Improve Transformer, section 2).

    Args:
        names: stored tensors that together are gate and up.
    """

    def __init__(
        self,
        prefix: str,
        hidden: int,
        intermediate: int,
        weights: WeightSource,
        *,
        names: Sequence[str] = ("gate_proj", "up_proj"),
        down: str = "down_proj",
        activation: object = "silu",
        bias: bool = False,
        adaptable: bool = True,
    ) -> None:
        function = find_activation(activation)
        # The products' own gate is SiLU.
        self._activation = None if function is F.silu else function
        rows = [intermediate] * 2 if len(names) == 2 else [2 * intermediate]
        self._gate_up = weights.linear(
            [prefix + name for name in names],
            rows,
            hidden,
            bias=bias,
            gated=self._activation is None,
            adaptable=adaptable,
        )
        self._down = weights.linear(
            [prefix + down], [hidden], intermediate, bias=bias, adaptable=adaptable
        )

    def __call__(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See ``FeedForward``."""
        inner = self._gate_up(x, norm=norm)
        if self._activation is not None:
            gate, up = inner.chunk(2, dim=-1)
            inner = self._activation(gate) * up
        return self._down(inner, residual=residual)


class PlainFeedForward:
    """``down(activation(up(x)))`` (Attention Is All You Need, section 3.3)."""

    def __init__(
        self,
        up: str,
        down: str,
        hidden: int,
        intermediate: int,
        weights: WeightSource,
        activation: object,
    ) -> None:
        self._activation = find_activation(activation)
        self._up = weights.linear([up], [intermediate], hidden, bias=True)
        self._down = weights.linear([down], [hidden], intermediate, bias=True)

    def __call__(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See ``FeedForward``."""
        return self._down(self._activation(self._up(x, norm=norm)), residual=residual)
