"""The op table: every operation with its reference and its versions, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.ops import reference, torch_cpu
from headrace.ops.attention import PagedAttention, flash_kernel, matmul_kernel
from headrace.ops.device import DTYPES, Device
from headrace.ops.paged import Attention
from headrace.ops.reference import ReferenceAttention


@dataclass(frozen=True, slots=True)
class Ops:
    """The operations of one device and dtype; ``reference`` documents each.

    Args:
        device: torch's name of the device.
        dtype: compute dtype.
        batch_invariant: results of one token depend on no other; the layer loop then runs
            micro-batches of one token.
    """

    device: str
    dtype: torch.dtype
    batch_invariant: bool
    pack_weight: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    embedding: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Attention[Any]


VERSIONS: dict[str, dict[str, Callable[..., object]]] = {
    "linear": {
        "reference": reference.linear,
        "torch_cpu": lambda x, weight, bias: torch_cpu.linear(
            x, torch_cpu.pack_weight(weight), bias
        ),
    },
    "embedding": {"reference": reference.embedding},
    "rms_norm": {"reference": reference.rms_norm, "torch_cpu": torch_cpu.rms_norm},
    "silu_and_mul": {"reference": reference.silu_and_mul, "torch_cpu": torch_cpu.silu_and_mul},
    "rotate": {"reference": reference.rotate},
    "attention": {
        "reference": lambda device, dtype: ReferenceAttention(device),
        "matmul": lambda device, dtype: PagedAttention(matmul_kernel, device, dtype),
        "flash": lambda device, dtype: PagedAttention(flash_kernel, device, dtype),
    },
}
"""Operation -> version -> function on plain tensors (for attention: its constructor). The
cross-tests run every version against "reference"."""


def make_ops(device: Device, dtype: str, *, batch_invariant: bool = False) -> Ops:
    """The fastest version of each operation that ``device`` has for ``dtype``."""
    kind = DTYPES[dtype]
    fast_cpu = device.name == "cpu" and not batch_invariant
    packed = fast_cpu and dtype == "bfloat16" and torch_cpu.packs_weights()
    attention: Attention[Any]
    if batch_invariant:
        attention = ReferenceAttention(device.name)
    else:
        kernel = flash_kernel if fast_cpu else matmul_kernel
        attention = PagedAttention(kernel, device.name, kind)
    return Ops(
        device=device.name,
        dtype=kind,
        batch_invariant=batch_invariant,
        pack_weight=torch_cpu.pack_weight if packed else reference.pack_weight,
        linear=torch_cpu.linear if packed else reference.linear,
        embedding=reference.embedding,
        rms_norm=torch_cpu.rms_norm if fast_cpu else reference.rms_norm,
        silu_and_mul=torch_cpu.silu_and_mul if fast_cpu else reference.silu_and_mul,
        rotate=reference.rotate,
        attention=attention,
    )
