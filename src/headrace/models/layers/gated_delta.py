"""The mixer of Gated DeltaNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.contracts.cache import LayerState, PlaneSpec
from headrace.errors import CheckpointError
from headrace.models.base import AttentionContext, WeightSource
from headrace.models.layers.values import read_number, read_size
from headrace.ops.linear import RMSNorm
from headrace.ops.recurrent import causal_convolution, gated_delta


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """Sizes of a mixer; value heads share key heads in groups."""

    hidden: int
    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    kernel: int
    norm_eps: float

    @classmethod
    def parse(cls, config: dict[str, Any]) -> DeltaShape:
        """Out of ``config.json``. Raises CheckpointError."""
        keys, values = (read_size(config, f"linear_num_{part}_heads") for part in ("key", "value"))
        if values % keys:
            raise CheckpointError(
                f"config.json: linear_num_value_heads {values} must be a multiple of "
                f"linear_num_key_heads {keys}"
            )
        return cls(
            hidden=read_size(config, "hidden_size"),
            key_heads=keys,
            value_heads=values,
            key_width=read_size(config, "linear_key_head_dim"),
            value_width=read_size(config, "linear_value_head_dim"),
            kernel=read_size(config, "linear_conv_kernel_dim", 4),
            norm_eps=read_number(config, "rms_norm_eps", 1e-6),
        )

    @property
    def keys(self) -> int:
        """Elements of all key heads."""
        return self.key_heads * self.key_width

    @property
    def values(self) -> int:
        """Elements of all value heads."""
        return self.value_heads * self.value_width

    def state(self) -> LayerState:
        """What a sequence keeps: the last inputs of the convolution, and the state."""
        channels, size = 2 * self.keys + self.values, self.key_width * self.value_width
        return LayerState(
            (
                PlaneSpec("convolution", "sequence", channels, self.kernel - 1, "float32"),
                PlaneSpec("state", "sequence", self.value_heads, size, "float32"),
            )
        )

    def row_orders(self) -> tuple[list[int], list[int]]:
        """Stored rows, key head by key head, in the order q, k, v, gate; and strength, decay."""
        each = self.value_heads // self.key_heads
        widths = [self.key_width, self.key_width, *[each * self.value_width] * 2]
        return _by_part(widths, self.key_heads), _by_part([each, each], self.key_heads)


def _by_part(widths: list[int], heads: int) -> list[int]:
    """Rows of heads that hold parts of these widths: all heads' first parts, then their second."""
    stride = sum(widths)
    firsts = [sum(widths[:part]) for part in range(len(widths))]
    return [
        head * stride + first + row
        for first, width in zip(firsts, widths, strict=True)
        for head in range(heads)
        for row in range(width)
    ]


class GatedDeltaMixer:
    """Gated Delta Networks, section 3.4."""

    def __init__(self, index: int, prefix: str, shape: DeltaShape, weights: WeightSource) -> None:
        self._index, self._shape = index, shape
        wide_order, narrow_order = shape.row_orders()
        self._wide = weights.linear(
            [prefix + "in_proj_qkvz"], [len(wide_order)], shape.hidden, order=wide_order
        )
        self._narrow = weights.linear(
            [prefix + "in_proj_ba"], [len(narrow_order)], shape.hidden, order=narrow_order
        )
        channels = 2 * shape.keys + shape.values
        stored = weights.tensor(prefix + "conv1d.weight", (channels, 1, shape.kernel))
        self._kernel = stored[:, 0]
        heads, wide = (shape.value_heads,), torch.float32
        self._decay = -weights.tensor(prefix + "A_log", heads, wide).exp()
        self._decay_bias = weights.tensor(prefix + "dt_bias", heads, wide)
        self._norm = weights.vector(prefix + "norm.weight", shape.value_width)
        self._output = weights.linear([prefix + "out_proj"], [shape.hidden], shape.values)

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
        mixed, gate = self._wide(x, norm=norm).split(
            [2 * shape.keys + shape.values, shape.values], 1
        )
        strength, decay = self._narrow(x, norm=norm).chunk(2, dim=1)
        mixed = causal_convolution(mixed, states["convolution"], self._kernel, None, context.rows)
        q, k, v = F.silu(mixed).split([shape.keys, shape.keys, shape.values], 1)
        q, k = (self._unit(part) for part in (q, k))
        log_decay = self._decay * F.softplus(decay.float() + self._decay_bias)
        out = gated_delta(
            q * shape.key_width**-0.5,
            k,
            v.unflatten(1, (shape.value_heads, -1)),
            log_decay,
            strength.float().sigmoid(),
            states["state"],
            context.rows,
        )
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + shape.norm_eps)
        out = (out * self._norm.float()).flatten(1) * F.silu(gate.float())
        return self._output(out.to(x.dtype), residual=residual)

    def _unit(self, x: Tensor) -> Tensor:
        """Heads of length 1, ``[T, value heads, key width]``, each for those that share it."""
        heads = x.float().unflatten(1, (self._shape.key_heads, -1))
        lengths = heads.square().sum(-1, keepdim=True)
        heads = torch.mul(heads, torch.rsqrt(lengths + 1e-6))
        return heads.repeat_interleave(self._shape.value_heads // self._shape.key_heads, dim=1)
