"""Weights and calls for every version of products with some neurons."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.linear import RMSNorm
from headrace.ops.neurons import Activation, NeuronTensors

SIZES = ((1, 1), (5, 33), (112, 64), (300, 129), (700, 200))
"""Neurons and hidden size."""

TOKENS = (1, 2, 3, 8, 9)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class NeuronCase:
    """One feed-forward, and the subsets that its inputs go through."""

    neurons: int
    hidden: int
    activation: Activation
    bias: bool
    quantized: bool = False

    def __str__(self) -> str:
        name = "silu" if self.activation is F.silu else "gelu"
        marks = ("-bias" if self.bias else "") + ("-int8" if self.quantized else "")
        return f"{self.neurons}x{self.hidden}-{name}{marks}"

    def tensors(self, dtype: torch.dtype) -> NeuronTensors:
        """The same weights for every call with the same arguments."""
        torch.manual_seed(self.neurons)
        weight = torch.randn(self.neurons, 3, self.hidden) / self.hidden**0.5
        inner_bias = torch.randn(self.neurons, 2) if self.bias else None
        bias = torch.randn(self.hidden) if self.bias else None
        tensors = NeuronTensors(weight.to(dtype), self.activation, inner_bias, bias)
        return tensors.quantized() if self.quantized else tensors

    def subsets(self, tokens: int) -> Tensor:
        """Of sizes from one to all, none for some inputs; padded beyond the longest by 2."""
        most = max(1, self.neurons // 2) if tokens % 2 else self.neurons
        chosen = torch.full((tokens, most + 2), -1, dtype=torch.int32)
        for token in range(tokens):
            size = 0 if token == 4 else int(torch.randint(1, most + 1, ()))
            chosen[token, :size] = torch.randperm(self.neurons)[:size].sort().values
        return chosen

    def calls(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Inputs, subsets and options."""
        norm = RMSNorm(torch.rand(self.hidden).to(dtype), 1e-5)
        for tokens, with_norm, with_residual in itertools.product(TOKENS, (0, 1), (0, 1)):
            # A part of a wider tensor.
            x = torch.randn(tokens, self.hidden + 5).to(dtype)[:, 2:-3]
            residual = torch.randn(tokens, self.hidden + 3).to(dtype)[:, 1:-2]
            options = {
                "norm": norm if with_norm else None,
                "residual": residual if with_residual else None,
            }
            yield x, self.subsets(tokens), options


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, gelu_tanh)

CASES = [
    NeuronCase(neurons, hidden, activation, bool(index % 2), quantized)
    for index, (neurons, hidden) in enumerate(SIZES)
    for activation in ACTIVATIONS
    for quantized in (False, True)
]
