"""Products with some neurons on the native CPU kernels: bfloat16, and weights in int8."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.extension import extension
from headrace.ops.linear import RMSNorm
from headrace.ops.native_linear import native_rms_norm
from headrace.ops.neurons import GatheredNeurons, NeuronProduct, NeuronTensors

if TYPE_CHECKING:
    from headrace.ops import _native


def native_neurons(context: _native.Context, tensors: NeuronTensors) -> NeuronProduct:
    """The kernels' product; torch's where they lack the activation."""
    if tensors.activation is F.silu:
        return NativeNeurons(context, tensors)
    return GatheredNeurons(tensors, partial(native_rms_norm, context))


class NativeNeurons(NeuronProduct):
    """What a neuron needs is read once for all inputs that go through it; the gate is SiLU."""

    def __init__(self, context: _native.Context, tensors: NeuronTensors) -> None:
        neurons, _, hidden = tensors.weight.shape
        weight, scales = tensors.weight, tensors.scales
        inner_bias, bias = tensors.inner_bias, tensors.bias
        kind = torch.bfloat16 if scales is None else torch.int8
        _check("the weight", weight, kind, (neurons, 3, hidden))
        if scales is not None:
            _check("the tensor of scales", scales, torch.float32, (neurons, 3))
        if inner_bias is not None:
            _check("the bias of gate and up", inner_bias, torch.float32, (neurons, 2))
        if bias is not None:
            _check("the bias", bias, torch.float32, (hidden,))
        module = extension()
        assert module is not None
        self.num_bytes = tensors.num_bytes
        self._context, self._tensors, self._hidden = context, tensors, hidden
        self._weight: _native.NeuronWeight = module.NeuronWeight(
            neurons=neurons,
            hidden=hidden,
            values=weight.data_ptr(),
            scales=0 if scales is None else scales.data_ptr(),
            inner_bias=0 if inner_bias is None else inner_bias.data_ptr(),
        )
        self._bias = 0 if bias is None else bias.data_ptr()

    def __call__(
        self,
        x: Tensor,
        chosen: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        rows, half = len(x), torch.bfloat16
        if x.stride(1) != 1:
            x = x.contiguous()
        if x.dtype != half or x.shape[1] != self._hidden:
            raise ValueError(
                f"native neurons: x is {x.dtype} {tuple(x.shape)}, and must be bfloat16 "
                f"[tokens, {self._hidden}]"
            )
        chosen = chosen.contiguous()
        _check("what is chosen", chosen, torch.int32, (rows, chosen.shape[1]))
        if norm is not None:
            _check("the norm", norm.weight, half, (self._hidden,))
        if residual is not None:
            if residual.stride(1) != 1:
                residual = residual.contiguous()
            if residual.dtype != half or residual.shape != x.shape:
                raise ValueError(
                    f"native neurons: the residual is {residual.dtype} {tuple(residual.shape)}, "
                    f"and must be bfloat16 {tuple(x.shape)}"
                )
        out = torch.empty((rows, self._hidden), dtype=half)
        self._context.multiply_chosen(
            self._weight,
            self._bias,
            x.data_ptr(),
            x.stride(0),
            rows,
            chosen.data_ptr(),
            chosen.shape[1],
            0 if norm is None else norm.weight.data_ptr(),
            0.0 if norm is None else norm.eps,
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            out.data_ptr(),
        )
        return out


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Memory is read by address: what does not fit is refused here."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"native neurons: {what} is {tensor.dtype} {tuple(tensor.shape)}, and must be {dtype} "
            f"{shape} without gaps"
        )
