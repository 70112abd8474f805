"""Products on the native CPU kernels: bfloat16 activations, weights of every packed format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.ops.block_weight import PLANES, BlockWeight, kernel_zero, table_bytes
from headrace.ops.extension import extension
from headrace.ops.linear import Linear, LinearOps, RMSNorm
from headrace.ops.packed_weight import (
    BF16,
    PANEL,
    PackedWeight,
    num_panels,
    part_shapes,
    store_rows,
)

if TYPE_CHECKING:
    from headrace.ops import _native


class NativeLinearOps(LinearOps):
    """Weights for the kernels of one context. Activations are bfloat16.

    Norm and quantization come before the product, bias, gate and residual after it, in one call.
    """

    keeps_blocks = True
    dense_layout = "packed"

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
        offsets = _stored_bias(bias, weight.gated)
        padded = weight.format.padded_columns(weight.columns)
        known = {
            "format": weight.format.kernel,
            "panels": num_panels(weight.rows, weight.gated),
            "columns": weight.columns,
            "padded_columns": padded,
            "group": weight.format.group or padded,
            "values": _address(weight.values),
            "scales": _address(weight.scales),
            "zeros": _address(weight.zeros),
            "bias": _address(offsets),
        }
        describe = partial(_describe_packed, known)
        return NativeLinear(self._context, weight, describe, offsets)

    def blocks(self, weight: BlockWeight, bias: Tensor | None = None) -> Linear:
        layout, offsets = weight.layout, _stored_bias(bias, weight.gated)
        table = table_bytes(layout)
        known = {
            "panels": num_panels(weight.rows, weight.gated),
            "columns": weight.columns,
            "padded_columns": layout.padded_columns(weight.columns),
            "group": layout.group,
            "bits": PLANES[layout.bits],
            "planes": (_address(weight.planes[0]), _address(weight.planes[1])),
            "table": _address(table),
            "zero": kernel_zero(layout),
            "super": layout.super,
            "wide_factors": weight.factors.dtype == torch.bfloat16,
            "factors": _address(weight.factors),
            "steps": _address(weight.steps),
            "low_factors": _address(weight.low_factors),
            "low_steps": _address(weight.low_steps),
            "zeros": _address(weight.zeros),
            "bias": _address(offsets),
        }
        keep = [tensor for tensor in (table, offsets) if tensor is not None]
        return NativeLinear(self._context, weight, partial(_describe_blocks, known), keep)


Describe = Callable[[int, bool], "_native.LinearWeight"]
"""Rows of the result, and whether gates are applied -> a weight as kernels know it."""


class NativeLinear(Linear):
    """One weight; the kernels read its tensors where they are.

    Args:
        context: kernels and threads.
        stored: holds the tensors.
        describe: makes what kernels are given.
        keep: other tensors that they read.
    """

    __slots__ = (
        "_columns",
        "_context",
        "_describe",
        "_handle",
        "_keep",
        "_open_handle",
        "_rows",
        "_stored_rows",
        "num_bytes",
        "weight",
    )

    def __init__(
        self,
        context: _native.Context,
        stored: PackedWeight | BlockWeight,
        describe: Describe,
        keep: object,
    ) -> None:
        self.weight, self._keep = stored, keep
        self._context, self._describe = context, describe
        self._rows = stored.rows // 2 if stored.gated else stored.rows
        self._stored_rows = num_panels(stored.rows, stored.gated) * PANEL
        self._columns = stored.columns
        self._handle = describe(self._rows, stored.gated)
        self._open_handle: _native.LinearWeight | None = None
        self.num_bytes = stored.num_bytes

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        self._check(x, norm, residual)
        return self._multiply(self._handle, self._rows, x, norm, residual, out_dtype)

    def ungated(self, x: Tensor, *, norm: RMSNorm | None = None) -> Tensor:
        # The same memory as a weight without a gate: panels of gate and up in turn.
        if self._open_handle is None:
            self._open_handle = self._describe(self._stored_rows, False)
        self._check(x, norm, None)
        out = self._multiply(self._open_handle, self._stored_rows, x, norm, None, None)
        halves = out.view(len(x), -1, 2, PANEL).transpose(1, 2).reshape(len(x), 2, -1)
        return halves[:, :, : self._rows].flatten(1)

    def _multiply(
        self,
        handle: _native.LinearWeight,
        width: int,
        x: Tensor,
        norm: RMSNorm | None,
        residual: Tensor | None,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        rows = x.shape[0]
        if x.stride(1) != 1:
            x = x.contiguous()
        wide = out_dtype == torch.float32
        out = torch.empty((rows, width), dtype=torch.float32 if wide else torch.bfloat16)
        self._context.linear(
            handle,
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

    def in_halves(self, tokens: int) -> bool:
        """Whether so many tokens are multiplied as bfloat16, with the weight rounded to that.

        Kernels of some instruction sets do this where it is faster than products with int8 by
        groups, and no worse: the activations then are not quantized.
        """
        return self._context.in_halves(self._handle, tokens)

    def _check(self, x: Tensor, norm: RMSNorm | None, residual: Tensor | None) -> None:
        """Memory is read by address: what does not fit is refused here."""
        half = torch.bfloat16
        if x.dtype != half or x.shape[1] != self._columns:
            raise ValueError(
                f"native linear: x is {x.dtype} {tuple(x.shape)}, and must be bfloat16 "
                f"[tokens, {self._columns}]"
            )
        if norm is not None and (
            norm.weight.dtype != half or norm.weight.shape != (self._columns,)
        ):
            raise ValueError(f"native linear: the norm must be bfloat16 [{self._columns}]")
        if residual is None:
            return
        fits = residual.dtype == half and residual.shape == (x.shape[0], self._rows)
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


def _describe_packed(known: dict[str, Any], rows: int, gated: bool) -> _native.LinearWeight:
    module = extension()
    assert module is not None
    weight: _native.LinearWeight = module.LinearWeight(**known, rows=rows, gated=gated)
    return weight


def _describe_blocks(known: dict[str, Any], rows: int, gated: bool) -> _native.LinearWeight:
    module = extension()
    assert module is not None
    weight: _native.LinearWeight = module.LinearWeight.blocks(**known, rows=rows, gated=gated)
    return weight


def _stored_bias(bias: Tensor | None, gated: bool) -> Tensor | None:
    """fp32 in stored order."""
    return None if bias is None else store_rows(bias.float(), gated)


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
