"""Gated feed-forward layers of which each input goes through some inner neurons only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.ops.linear import RMSNorm, quantize_activations

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""As ``reference.rms_norm``."""

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class NeuronTensors:
    """The weights of a gated feed-forward, neuron by neuron.

    What one neuron needs lies together in memory, so that k of N neurons read k / N of the bytes.

    Args:
        weight: ``[N, 3, hidden]`` in the compute dtype or int8, without gaps: of each neuron the
            row of the gate, the row of what it gates, and the column of the product behind them.
        activation: of the gate.
        inner_bias: fp32 ``[N, 2]``, of gate and of what it gates.
        bias: fp32 ``[hidden]``, of the result.
        scales: fp32 ``[N, 3]`` of int8: what a step of it stands for.
    """

    weight: Tensor
    activation: Activation
    inner_bias: Tensor | None = None
    bias: Tensor | None = None
    scales: Tensor | None = None

    def quantized(self) -> NeuronTensors:
        """In int8, each row and column with the scale of its largest magnitude."""
        values, scales = quantize_activations(self.weight.flatten(0, 1), None)
        shape = self.weight.shape
        return replace(self, weight=values.view(shape), scales=scales.view(shape[:2]))

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        tensors = (self.weight, self.inner_bias, self.bias, self.scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class NeuronProduct(ABC):
    """``down(activation(gate(x)) * up(x))`` over neurons that are chosen for each input.

    Attributes:
        num_bytes: what it holds in memory.
    """

    num_bytes: int

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        chosen: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``norm(x)`` worked on, and added to ``residual``; sums in fp32.

        Args:
            x: ``[T, hidden]`` in the compute dtype.
            chosen: int32 ``[T, most]``: different neurons for each input, -1 behind the last.
            residual: as the result.

        Returns:
            ``[T, hidden]`` in the compute dtype.
        """


class ReferenceNeurons(NeuronProduct):
    """Plainly right: all neurons are computed in fp32, and those not chosen count for nothing."""

    def __init__(self, tensors: NeuronTensors, rms_norm: Norm) -> None:
        self._tensors, self._rms_norm = tensors, rms_norm
        self.num_bytes = tensors.num_bytes

    def __call__(
        self,
        x: Tensor,
        chosen: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if norm is None:
            normed = x
        else:
            normed = self._rms_norm(x, norm.weight, norm.eps)
        weight = self._tensors.weight.float()
        if self._tensors.scales is not None:
            weight = weight * self._tensors.scales.unsqueeze(2)
        gates, ups, downs = weight.unbind(1)
        gate, up = normed.float() @ gates.T, normed.float() @ ups.T
        if self._tensors.inner_bias is not None:
            gate, up = gate + self._tensors.inner_bias[:, 0], up + self._tensors.inner_bias[:, 1]
        inner = self._tensors.activation(gate) * up
        kept = torch.zeros(len(x), 1 + len(downs), dtype=torch.bool, device=x.device)
        kept.scatter_(1, chosen.long() + 1, True)
        out = inner.masked_fill(~kept[:, 1:], 0.0) @ downs
        if self._tensors.bias is not None:
            out = out + self._tensors.bias
        return (out if residual is None else residual + out).to(x.dtype)


class GatheredNeurons(NeuronProduct):
    """Torch's products with the chosen neurons alone, one input after another."""

    def __init__(self, tensors: NeuronTensors, rms_norm: Norm) -> None:
        self._tensors, self._rms_norm = tensors, rms_norm
        self.num_bytes = tensors.num_bytes

    def __call__(
        self,
        x: Tensor,
        chosen: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        normed = x if norm is None else self._rms_norm(x, norm.weight, norm.eps)
        counts = (chosen >= 0).sum(1).tolist()
        rows = zip(normed, chosen, counts, strict=True)
        out = torch.stack([self._one(row, ids[:count]) for row, ids, count in rows])
        return (out if residual is None else residual + out).to(x.dtype)

    def _one(self, x: Tensor, neurons: Tensor) -> Tensor:
        """``[hidden]`` and the chosen neurons ``[k]`` -> fp32 ``[hidden]``."""
        weight = self._tensors.weight.index_select(0, neurons).to(x.dtype)
        sums = (weight[:, :2].flatten(0, 1) @ x).float().view(-1, 2)
        scales, bias = (
            None if each is None else each.index_select(0, neurons)
            for each in (self._tensors.scales, self._tensors.inner_bias)
        )
        if scales is not None:
            sums = sums * scales[:, :2]
        if bias is not None:
            sums = sums + bias
        inner = self._tensors.activation(sums[:, 0]) * sums[:, 1]
        if scales is not None:
            inner = inner * scales[:, 2]
        out = (inner.to(x.dtype) @ weight[:, 2]).float()
        return out if self._tensors.bias is None else out + self._tensors.bias
