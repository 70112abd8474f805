"""Weights of gated feed-forward layers once more, neuron by neuron."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.contracts.load_map import GatedNames, LoadMap
from headrace.ops.neurons import Activation, NeuronProduct, NeuronTensors
from headrace.ops.packed_weight import BF16
from headrace.ops.table import Ops
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.formats import WeightPlan
from headrace.weights.reader import Stack, WeightReader


class NeuronLoader:
    """Makes gated feed-forward layers ready for products with some of their inner neurons.

    They come beside the packed weights that all neurons are computed with: where these are
    quantized, in int8, else in the compute dtype.
    """

    def __init__(
        self, checkpoint: Checkpoint, load_map: LoadMap, ops: Ops, plan: WeightPlan
    ) -> None:
        self._checkpoint, self._ops = checkpoint, ops
        self._quantized = plan.body is not None and plan.body != BF16
        self._reader = WeightReader(checkpoint, load_map)

    def __call__(self, names: GatedNames, activation: Activation) -> NeuronProduct:
        """Read one.

        Raises:
            ValueError: the checkpoint has no plain weights.
            CheckpointError: a weight is missing or damaged.
        """
        if WeightPlan.stored(self._checkpoint.config) is not None:
            raise ValueError(
                "needs plain weights, and the checkpoint is packed; use the one that it was "
                "quantized from"
            )
        hidden, neurons = names.hidden, names.neurons
        rows = [2 * neurons // len(names.gate_up)] * len(names.gate_up)
        inner = Stack(names.gate_up, rows, hidden, names.bias)
        outer = Stack([names.down], [hidden], neurons, names.bias)
        weight = torch.empty(neurons, 3, hidden, dtype=self._ops.dtype)
        weight[:, :2] = self._reader.weight(inner).view(2, neurons, hidden).transpose(0, 1)
        weight[:, 2] = self._reader.weight(outer).T
        inner_bias = self._vector(self._reader.bias(inner))
        tensors = NeuronTensors(
            weight.to(self._ops.device),
            activation,
            None if inner_bias is None else inner_bias.view(2, neurons).T.contiguous(),
            self._vector(self._reader.bias(outer)),
        )
        return self._ops.neurons(tensors.quantized() if self._quantized else tensors)

    def _vector(self, stored: Tensor | None) -> Tensor | None:
        """A bias in fp32, rounded to the compute dtype as all weights are."""
        if stored is None:
            return None
        return stored.to(self._ops.device, self._ops.dtype).float()
