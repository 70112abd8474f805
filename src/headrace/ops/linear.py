"""Products with weights in every format, with what stands before and after them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.disk import FilePlace
from headrace.ops import reference
from headrace.ops.block_weight import BlockWeight, unpack_blocks
from headrace.ops.packed_weight import (
    ACTIVATION_GROUP,
    BF16,
    PackedWeight,
    unpack,
    unpack_dense,
)

_ROWS_AT_ONCE = 4096
"""Rows of a quantized weight that are in memory as fp32 at once."""


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """A norm before a product: its weight ``[K]`` and what is added to the mean square."""

    weight: Tensor
    eps: float


class Linear(ABC):
    """A weight ``[N, K]`` that an implementation has made ready for products.

    Attributes:
        num_bytes: what it holds in memory, without its bias.
    """

    num_bytes: int

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``norm(x) @ weight^T + bias``, then the gate, then ``+ residual``.

        Args:
            x: ``[T, K]`` in the compute dtype; of any stride from row to row.
            residual: as the result.
            out_dtype: of the result; the compute dtype if ``None``, else fp32.

        Returns:
            ``[T, N]``; of a gated weight, the halves of whose rows are a gate and what it gates,
            ``silu(gate) * up``, ``[T, N / 2]`` (GLU Variants Improve Transformer, section 2).
        """

    @abstractmethod
    def ungated(self, x: Tensor, *, norm: RMSNorm | None = None) -> Tensor:
        """Of a gated weight, gate and up as they are before the gate, ``[T, N]``."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` (int64 ``[T]``) of the weight, ``[T, K]`` in the compute dtype.

        Only for weights that are not gated; of dense ones, for those made ``indexed``.
        """


class LinearOps(ABC):
    """Makes weights ready, for the device and compute dtype it was made for.

    Every implementation takes every format; those without a kernel for one inherit the
    reference's. Biases are ``[N]`` in the compute dtype.
    """

    keeps_blocks: bool = False
    """Whether weights in blocks are multiplied as they are, and better kept so than dequantized."""
    dense_layout: Literal["plain", "packed", "opaque"] = "plain"
    """How dense weights are kept: ``[N, K]``, packed, or as a library likes it. Those of the first
    two kinds are read where they lie."""

    def expect(self, name: str, places: Mapping[str, FilePlace] | None = None) -> None:
        """What is made ready next belongs to the weight of that name.

        Args:
            places: where tensors of a packed weight lie in files, by the names of its fields.
        """
        return None

    @abstractmethod
    def dense(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        indexed: bool = False,
    ) -> Linear:
        """A weight ``[N, K]`` in the compute dtype, which may be kept or not.

        ``indexed``: its rows will be asked for.
        """

    @abstractmethod
    def packed(self, weight: PackedWeight, bias: Tensor | None = None) -> Linear:
        """A packed weight; its tensors are kept as they are, since they may view a file."""

    @abstractmethod
    def blocks(self, weight: BlockWeight, bias: Tensor | None = None) -> Linear:
        """A weight in planes of bits; activations are int8, a scale for every 256 columns."""


def quantize_activations(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Symmetric int8 for each token, or for each token and group of columns.

    Args:
        x: ``[T, K]``; group: columns that share a scale, ``None`` for all.

    Returns:
        int8 ``[T, K]`` and fp32 scales ``[T, groups]``: the largest magnitude / 127, or 1 where
        that is 0; rounded half to even (LLM.int8(), section 2.1, absmax quantization).
    """
    columns = x.shape[1]
    size = group or columns
    groups = F.pad(x.float(), (0, -columns % size)).unflatten(1, (-1, size))
    scales = groups.abs().amax(-1) / 127
    scales = scales.masked_fill(scales == 0, 1.0)
    values = (groups / scales.unsqueeze(-1)).round().to(torch.int8)
    return values.flatten(1)[:, :columns], scales


class ReferenceLinear(LinearOps):
    """Plainly right, on any device: dense weights in ``[N, K]``, quantized ones spelled out."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def dense(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        indexed: bool = False,
    ) -> Linear:
        ready = self.ready(weight)
        copies = 2 if indexed and ready is not weight else 1
        multiply = partial(self.multiply, weight=ready, bias=bias)
        rows = partial(F.embedding, weight=weight) if indexed else None
        return ComposedLinear(self, multiply, rows, gated, copies * weight.nbytes)

    def packed(self, weight: PackedWeight, bias: Tensor | None = None) -> Linear:
        if weight.format == BF16:
            ready = self.ready(unpack_dense(weight).to(self._dtype))
            multiply = partial(self.multiply, weight=ready, bias=bias)
        else:
            multiply = partial(self.multiply_quantized, weight=weight, bias=bias)
        rows = partial(self.dequantize_rows, weight=weight)
        return ComposedLinear(self, multiply, rows, weight.gated, weight.num_bytes)

    def blocks(self, weight: BlockWeight, bias: Tensor | None = None) -> Linear:
        multiply = partial(self.multiply_blocks, weight=weight, bias=bias)
        rows = partial(self.dequantize_blocks, weight=weight)
        return ComposedLinear(self, multiply, rows, weight.gated, weight.num_bytes)

    def ready(self, weight: Tensor) -> Tensor:
        """A dense weight ``[N, K]`` as ``multiply`` takes it; here unchanged."""
        return weight

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[T, K] @ [N, K]^T + [N] -> [T, N]`` in the compute dtype."""
        return F.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """See ``reference.rms_norm``."""
        return reference.rms_norm(x, norm.weight, norm.eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See ``reference.silu_and_mul``."""
        return reference.silu_and_mul(gate_up)

    def multiply_quantized(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """``sum over groups of x's scale * weight's scale * sum of q_x * (u - zero)``, in fp32."""
        size = weight.format.activation_group or weight.columns
        values, scales = quantize_activations(x, size)
        rounded = values.float() * scales.repeat_interleave(size, 1)[:, : weight.columns]
        parts = [
            F.linear(rounded, unpack(weight, rows).dequantize(weight.format))
            for rows in torch.arange(weight.rows, device=x.device).split(_ROWS_AT_ONCE)
        ]
        product = torch.cat(parts, 1)
        return product if bias is None else product + bias

    def multiply_blocks(self, x: Tensor, weight: BlockWeight, bias: Tensor | None) -> Tensor:
        """The product of what both stand for, activations rounded to int8, in fp32."""
        values, scales = quantize_activations(x, ACTIVATION_GROUP)
        wide = scales.repeat_interleave(ACTIVATION_GROUP, 1)[:, : weight.columns]
        rounded = values.float() * wide
        parts = [
            F.linear(rounded, unpack_blocks(weight, rows).dequantize(weight.layout))
            for rows in torch.arange(weight.rows, device=x.device).split(_ROWS_AT_ONCE)
        ]
        product = torch.cat(parts, 1)
        return product if bias is None else product + bias

    def dequantize_blocks(self, ids: Tensor, weight: BlockWeight) -> Tensor:
        """Rows ``ids`` in the compute dtype."""
        return unpack_blocks(weight, ids).dequantize(weight.layout).to(self._dtype)

    def dequantize_rows(self, ids: Tensor, weight: PackedWeight) -> Tensor:
        """Rows ``ids`` of a packed weight in the compute dtype."""
        if weight.format == BF16:
            return unpack_dense(weight, ids).to(self._dtype)
        return unpack(weight, ids).dequantize(weight.format).to(self._dtype)


class ComposedLinear(Linear):
    """A product with the operations around it, one after the other.

    Args:
        ops: has the operations.
        multiply: ``[T, K] -> [T, N]``, in the compute dtype or fp32.
        lookup: ids ``[T]`` -> ``[T, K]``.
    """

    def __init__(
        self,
        ops: ReferenceLinear,
        multiply: Callable[[Tensor], Tensor],
        lookup: Callable[[Tensor], Tensor] | None,
        gated: bool,
        num_bytes: int,
    ) -> None:
        self._ops = ops
        self._multiply = multiply
        self._lookup = lookup
        self._gated = gated
        self.num_bytes = num_bytes

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = self._multiply(x if norm is None else self._ops.rms_norm(x, norm))
        if self._gated:
            out = self._ops.silu_and_mul(out)
        if residual is not None:
            out = residual + out
        return out.to(out_dtype or x.dtype)

    def ungated(self, x: Tensor, *, norm: RMSNorm | None = None) -> Tensor:
        return self._multiply(x if norm is None else self._ops.rms_norm(x, norm)).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        if self._lookup is None:
            raise ValueError("the weight was not made for looking up rows")
        return self._lookup(ids)
