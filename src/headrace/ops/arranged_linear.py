"""Products put together from others: of rows in several formats, or of columns in another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace.ops.linear import Linear, RMSNorm


class JoinedLinear(Linear):
    """Weights in different formats, one above the other.

    Args:
        parts: whose rows follow each other; none is gated.
        gated: whether the first half of all rows is a gate.
    """

    def __init__(
        self, parts: Sequence[Linear], gated: bool, silu_and_mul: Callable[[Tensor], Tensor]
    ) -> None:
        self._parts, self._gated, self._silu_and_mul = parts, gated, silu_and_mul
        self.num_bytes = sum(part.num_bytes for part in parts)

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = torch.cat([part(x, norm=norm, out_dtype=out_dtype) for part in self._parts], 1)
        if self._gated:
            out = self._silu_and_mul(out)
        return out if residual is None else residual + out

    def ungated(self, x: Tensor, *, norm: RMSNorm | None = None) -> Tensor:
        return torch.cat([part(x, norm=norm) for part in self._parts], 1)

    def rows(self, ids: Tensor) -> Tensor:
        raise ValueError("rows of joined weights are not looked up")


class PermutedLinear(Linear):
    """A weight whose columns lie in another order, so that groups of them share a scale.

    Args:
        base: of the columns in the order that they are stored in.
        columns: int64 ``[K]``: for each stored column, the input that it is for.
    """

    def __init__(self, base: Linear, columns: Tensor) -> None:
        self._base, self._columns = base, columns
        self.num_bytes = base.num_bytes + columns.nbytes
        self._norm_known: tuple[RMSNorm, RMSNorm] | None = None

    def _norm(self, norm: RMSNorm | None) -> RMSNorm | None:
        """The norm of inputs in the stored order; a norm is the same in any."""
        if norm is None:
            return None
        if self._norm_known is None or self._norm_known[0] is not norm:
            self._norm_known = (norm, RMSNorm(norm.weight[self._columns], norm.eps))
        return self._norm_known[1]

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        moved = x[:, self._columns]
        return self._base(moved, norm=self._norm(norm), residual=residual, out_dtype=out_dtype)

    def ungated(self, x: Tensor, *, norm: RMSNorm | None = None) -> Tensor:
        return self._base.ungated(x[:, self._columns], norm=self._norm(norm))

    def rows(self, ids: Tensor) -> Tensor:
        found = self._base.rows(ids)
        out = torch.empty_like(found)
        out[:, self._columns] = found
        return out
