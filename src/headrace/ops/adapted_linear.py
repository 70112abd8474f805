"""Products whose rows may each have a low-rank addition of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops.linear import Linear, RMSNorm


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a weight: ``up @ down`` (LoRA, section 4.1).

    Args:
        down: ``[R, K]``; up: ``[N, R]``, the adapter's scale in it.
    """

    down: Tensor
    up: Tensor


class AdapterRoutes:
    """Which rows of the micro-batch that runs go through which adapter.

    The layer loop sets it before the layers run.

    Attributes:
        rows: key of an adapter and its rows, int64 ``[n]``; none for rows without one.
    """

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: Sequence[tuple[str, Tensor]] = ()


class AdaptedLinear(Linear):
    """A weight that stays as it is, beside the additions of any number of adapters.

    A step without adapters costs what it costs without this.

    Attributes:
        adapters: key -> addition.
    """

    __slots__ = ("_base", "_gated", "_rms_norm", "_routes", "_silu_and_mul", "adapters")

    def __init__(
        self,
        base: Linear,
        gated: bool,
        routes: AdapterRoutes,
        rms_norm: Callable[[Tensor, Tensor, float], Tensor],
        silu_and_mul: Callable[[Tensor], Tensor],
    ) -> None:
        self._base, self._gated, self._routes = base, gated, routes
        self._rms_norm, self._silu_and_mul = rms_norm, silu_and_mul
        self.adapters: dict[str, LowRank] = {}

    @property
    def num_bytes(self) -> int:  # type: ignore[override]
        """Of the weight alone."""
        return self._base.num_bytes

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        routed = [
            (self.adapters[key], rows) for key, rows in self._routes.rows if key in self.adapters
        ]
        if not routed:
            return self._base(x, norm=norm, residual=residual, out_dtype=out_dtype)
        if self._gated:
            out = self._base.ungated(x, norm=norm)
        else:
            out = self._base(x, norm=norm, residual=residual, out_dtype=out_dtype)
        for adapter, rows in routed:
            part = x[rows]
            if norm is not None:
                part = self._rms_norm(part, norm.weight, norm.eps)
            added = (part @ adapter.down.T) @ adapter.up.T
            out.index_add_(0, rows, added.to(out.dtype))
        if not self._gated:
            return out
        out = self._silu_and_mul(out)
        if residual is not None:
            out = residual + out
        return out.to(out_dtype or x.dtype)

    def ungated(self, x: Tensor, *, norm: RMSNorm | None = None) -> Tensor:
        raise RuntimeError("an adapted weight is not adapted again")

    def rows(self, ids: Tensor) -> Tensor:
        return self._base.rows(ids)
