"""The mixer of Mamba-2: a convolution and a selective scan in place of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.contracts.cache import PlaneSpec
from headrace.errors import CheckpointError
from headrace.models.base import AttentionContext, WeightSource
from headrace.ops.linear import RMSNorm
from headrace.ops.recurrent import causal_convolution, selective_scan


@dataclass(frozen=True, slots=True)
class MambaShape:
    """Sizes of a mixer.

    Args:
        inner: of what is scanned, ``heads`` times the width of a head.
        groups: of heads that share what leads into the state and out of it.
        state: elements of the state for each element of a head.
        kernel: inputs that the convolution sees.
        step_limit: least and largest step.
        norm_eps: of the norm behind the scan; ``None``: there is none.
        gate_first: whether the gate comes before that norm.
        multipliers: of the input, and of gate, x, B, C and step after the projection.
    """

    hidden: int
    inner: int
    heads: int
    groups: int
    state: int
    kernel: int
    bias: bool
    convolution_bias: bool
    output_bias: bool
    step_limit: tuple[float, float] = (0.0, float("inf"))
    norm_eps: float | None = 1e-5
    gate_first: bool = True
    multipliers: Sequence[float] = (1.0,) * 6

    def __post_init__(self) -> None:
        if self.inner % self.heads or self.heads % self.groups:
            raise CheckpointError(
                f"config.json: the {self.groups} groups of Mamba must share {self.heads} heads "
                f"evenly, and these {self.inner} elements"
            )

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return self.inner + 2 * self.groups * self.state

    def planes(self) -> tuple[PlaneSpec, ...]:
        """What a sequence keeps: the last inputs of the convolution, and the state."""
        width = self.inner // self.heads
        return (
            PlaneSpec("convolution", "sequence", self.channels, self.kernel - 1, "float32"),
            PlaneSpec("state", "sequence", self.heads, width * self.state, "float32"),
        )


class MambaMixer:
    """Transformers are SSMs, section 7."""

    def __init__(self, index: int, prefix: str, shape: MambaShape, weights: WeightSource) -> None:
        self._index, self._shape = index, shape
        inner, heads, group = shape.inner, shape.heads, shape.groups * shape.state
        total = inner + shape.channels + heads
        self._down = weights.linear([prefix + "in_proj"], [total], shape.hidden, bias=shape.bias)
        into, *others = shape.multipliers
        sizes = (inner, inner, group, group, heads)
        factors = [
            into * factor for factor, size in zip(others, sizes, strict=True) for _ in range(size)
        ]
        self._factors = torch.tensor(factors) if set(factors) != {1.0} else None
        stored = weights.tensor(prefix + "conv1d.weight", (shape.channels, 1, shape.kernel))
        self._kernel, self._kernel_bias = stored[:, 0], None
        if shape.convolution_bias:
            self._kernel_bias = weights.vector(prefix + "conv1d.bias", shape.channels)
        wide = torch.float32
        self._decay = -weights.tensor(prefix + "A_log", (heads,), wide).exp()
        self._skip = weights.tensor(prefix + "D", (heads,), wide)
        self._step_bias = weights.tensor(prefix + "dt_bias", (heads,), wide)
        self._norm = None
        if shape.norm_eps is not None:
            self._norm = weights.vector(prefix + "norm.weight", inner)
        self._output = weights.linear(
            [prefix + "out_proj"], [shape.hidden], inner, bias=shape.output_bias
        )

    def __call__(
        self,
        x: Tensor,
        context: AttentionContext,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See ``Mixer``."""
        shape, states = self._shape, context.states(self._index)
        projected = self._down(x, norm=norm)
        if self._factors is not None:
            projected = (projected * self._factors.to(x.device)).to(x.dtype)
        group = shape.groups * shape.state
        gate, mixed, steps = projected.split([shape.inner, shape.channels, shape.heads], 1)
        mixed = F.silu(
            causal_convolution(
                mixed, states["convolution"], self._kernel, self._kernel_bias, context.rows
            )
        )
        values, into, out_of = mixed.split([shape.inner, group, group], 1)
        values = values.unflatten(1, (shape.heads, -1))
        steps = F.softplus(steps.float() + self._step_bias).clamp(*shape.step_limit)
        out = selective_scan(
            values,
            steps,
            self._decay,
            into.unflatten(1, (shape.groups, -1)),
            out_of.unflatten(1, (shape.groups, -1)),
            states["state"],
            context.rows,
        )
        out = (out + values.float() * self._skip.unsqueeze(1)).flatten(1)
        return self._output(self._finish(out, gate.float()).to(x.dtype), residual=residual)

    def _finish(self, out: Tensor, gate: Tensor) -> Tensor:
        """Gate and norm, fp32 ``[T, inner]``."""
        shape, opened = self._shape, F.silu(gate)
        if self._norm is None or shape.norm_eps is None:
            return out * opened
        if shape.gate_first:
            out = out * opened
        grouped = out.unflatten(1, (shape.groups, -1))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + shape.norm_eps)
        out = grouped.flatten(1) * self._norm.float()
        return out if shape.gate_first else out * opened
