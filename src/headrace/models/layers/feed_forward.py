"""Feed-forward layers: work on each token alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.contracts.load_map import GatedNames
from headrace.errors import CheckpointError
from headrace.models.base import (
    DividedFeedForward,
    NeuronRoutes,
    NeuronStep,
    WeightSource,
)
from headrace.ops.linear import RMSNorm
from headrace.ops.neurons import NeuronProduct


class FeedForward(Protocol):
    """Work on each token alone.

    Attributes:
        gated: itself, if it is a gated one; what is put together from several is not.
    """

    @property
    def gated(self) -> DividedFeedForward | None:
        """See the class."""

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
        gate_up = tuple(prefix + name for name in names)
        self.names = GatedNames(gate_up, prefix + down, hidden, intermediate, bias)
        self.activation = function
        self._divided: tuple[int, NeuronProduct, NeuronRoutes] | None = None
        self._gate_up = weights.linear(
            gate_up,
            rows,
            hidden,
            bias=bias,
            gated=self._activation is None,
            adaptable=adaptable,
        )
        self._down = weights.linear(
            [prefix + down], [hidden], intermediate, bias=bias, adaptable=adaptable
        )

    @property
    def gated(self) -> DividedFeedForward:
        """See ``FeedForward``."""
        return self

    def divide(self, layer: int, neurons: NeuronProduct, routes: NeuronRoutes) -> None:
        """See ``DividedFeedForward``."""
        self._divided = layer, neurons, routes

    def __call__(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See ``FeedForward``."""
        if self._divided is not None:
            layer, neurons, routes = self._divided
            if routes.step is not None:
                return self._in_parts(x, norm, residual, layer, neurons, routes.step)
        return self._down(self._inner(x, norm), residual=residual)

    def _inner(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """What the inner neurons say, ``[T, intermediate]``."""
        inner = self._gate_up(x, norm=norm)
        if self._activation is not None:
            gate, up = inner.chunk(2, dim=-1)
            inner = self._activation(gate) * up
        return inner

    def _in_parts(
        self,
        x: Tensor,
        norm: RMSNorm | None,
        residual: Tensor | None,
        layer: int,
        neurons: NeuronProduct,
        step: NeuronStep,
    ) -> Tensor:
        """Some inputs go through some neurons."""
        if step.partial is None:
            inner = self._inner(x, norm)
            step.observe(layer, inner)
            return self._down(inner, residual=residual)
        if step.whole is None:
            return neurons(x, step.chosen(layer), norm=norm, residual=residual)
        out = torch.empty_like(x)
        inner = self._inner(x[step.whole], norm)
        step.observe(layer, inner)
        added = None if residual is None else residual[step.whole]
        out[step.whole] = self._down(inner, residual=added)
        added = None if residual is None else residual[step.partial]
        chosen = step.chosen(layer)
        out[step.partial] = neurons(x[step.partial], chosen, norm=norm, residual=added)
        return out


class PlainFeedForward:
    """``down(activation(up(x)))`` (Attention Is All You Need, section 3.3)."""

    gated = None

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
