"""Products on the native CPU kernels: bfloat16 activations, weights of every packed format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.ops.extension import extension
from headrace.ops.linear import Linear, LinearOps, RMSNorm
from headrace.ops.packed_weight import BF16, PackedWeight, num_panels, part_shapes, store_rows

if TYPE_CHECKING:
    from headrace.ops import _native


class NativeLinearOps(LinearOps):
    """Weights for the kernels of one context. Activations are bfloat16.

    Norm and quantization come before the product, bias, gate and residual after it, in one call.
    """

    def __init__(self, context: _native.Context) -> None:
        self._context = context

    def dense(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        indexed: bool = False,
    ) -> Linear:
        rows, columns = weight.shape
        dtype, shape = part_shapes(BF16, rows, columns, gated)["values"]
        values = torch.empty(shape, dtype=dtype)
        weight = weight.to(dtype).contiguous()
        padded = BF16.padded_columns(columns)
        self._context.pack_bf16(weight.data_ptr(), rows, columns, padded, gated, values.data_ptr())
        return self.packed(PackedWeight(BF16, rows, columns, gated, values), bias)

    def packed(self, weight: PackedWeight, bias: Tensor | None = None) -> Linear:
        return NativeLinear(self._context, weight, bias)


class NativeLinear(Linear):
    """One packed weight; the kernels read its tensors where they are."""

    __slots__ = ("_columns", "_context", "_handle", "_offsets", "_rows", "num_bytes", "weight")

    def __init__(self, context: _native.Context, weight: PackedWeight, bias: Tensor | None) -> None:
        module = extension()
        assert module is not None
        offsets = None if bias is None else store_rows(bias.float(), weight.gated)
        padded = weight.format.padded_columns(weight.columns)
        self._handle = module.LinearWeight(
            format=weight.format.kernel,
            panels=num_panels(weight.rows, weight.gated),
            rows=weight.rows // 2 if weight.gated else weight.rows,
            columns=weight.columns,
            padded_columns=padded,
            group=weight.format.group or padded,
            gated=weight.gated,
            values=_address(weight.values),
            scales=_address(weight.scales),
            zeros=_address(weight.zeros),
            bias=_address(offsets),
        )
        self.weight, self._offsets = weight, offsets  # the kernels read their memory
        self._context = context
        self._rows = weight.rows // 2 if weight.gated else weight.rows
        self._columns = weight.columns
        self.num_bytes = weight.num_bytes

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        rows, width = x.shape[0], self._rows
        self._check(x, norm, residual)
        if x.stride(1) != 1:
            x = x.contiguous()
        wide = out_dtype == torch.float32
        out = torch.empty((rows, width), dtype=torch.float32 if wide else torch.bfloat16)
        self._context.linear(
            self._handle,
            x.data_ptr(),
            x.stride(0),
            rows,
            0 if norm is None else norm.weight.data_ptr(),
            0.0 if norm is None else norm.eps,
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            out.data_ptr(),
            width,
            wide,
        )
        return out

    def _check(self, x: Tensor, norm: RMSNorm | None, residual: Tensor | None) -> None:
        """Memory is read by address: what does not fit is refused here."""
        half = torch.bfloat16
        if x.dtype != half or x.shape[1] != self._columns:
            raise ValueError(
                f"native linear: x is {x.dtype} {tuple(x.shape)}, and must be bfloat16 "
                f"[tokens, {self._columns}]"
            )
        if norm is not None and (norm.weight.dtype != half or len(norm.weight) != self._columns):
            raise ValueError(f"native linear: the norm must be bfloat16 [{self._columns}]")
        if residual is None:
            return
        fits = residual.dtype == half and residual.shape == (len(x), self._rows)
        if not fits or residual.stride(1) != 1:
            raise ValueError(
                f"native linear: the residual is {residual.dtype} {tuple(residual.shape)}, and "
                f"must be bfloat16 {(len(x), self._rows)} with contiguous rows"
            )

    def rows(self, ids: Tensor) -> Tensor:
        if ids.dtype != torch.int64 or not ids.is_contiguous():
            raise ValueError("native linear: ids must be contiguous int64")
        out = torch.empty((len(ids), self._columns), dtype=torch.bfloat16)
        self._context.rows_of(self._handle, ids.data_ptr(), len(ids), out.data_ptr())
        return out


def native_rms_norm(context: _native.Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``; bfloat16."""
    lines = x.reshape(-1, x.shape[-1])
    out = torch.empty(lines.shape, dtype=torch.bfloat16)
    context.rms_norm(
        lines.data_ptr(),
        lines.stride(0),
        len(lines),
        x.shape[-1],
        weight.data_ptr(),
        eps,
        out.data_ptr(),
    )
    return out.view(x.shape)


def _address(tensor: Tensor | None) -> int:
    """Where a tensor's bytes lie, 0 for none. The kernels need them without gaps."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()
