"""The op table: every operation with its reference and its versions, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.errors import ConfigurationError
from headrace.ops import reference, torch_cpu
from headrace.ops.attention import PagedAttention, flash_kernel, matmul_kernel
from headrace.ops.chosen_attention import ChosenAttention
from headrace.ops.coded_attention import CodedAttention, NativeCodedAttention
from headrace.ops.device import DTYPES, Device
from headrace.ops.extension import TORCH, open_context
from headrace.ops.host import usable_cores
from headrace.ops.linear import LinearOps, ReferenceLinear
from headrace.ops.native_attention import NativeAttention
from headrace.ops.native_linear import NativeLinearOps, native_rms_norm
from headrace.ops.native_neurons import native_neurons
from headrace.ops.neurons import (
    GatheredNeurons,
    NeuronProduct,
    NeuronTensors,
    ReferenceNeurons,
)
from headrace.ops.paged import Attention
from headrace.ops.reference import ReferenceAttention
from headrace.ops.selection import (
    Selection,
    native_highest,
    native_lowest_kept,
    partitioned_strongest,
)

if TYPE_CHECKING:
    from headrace.ops import _native


@dataclass(frozen=True, slots=True)
class Ops:
    """The operations of one device and dtype; ``reference`` documents each.

    Args:
        device: torch's name of the device.
        dtype: compute dtype.
        batch_invariant: results of one token depend on no other; the layer loop then runs
            micro-batches of one token.
        isa: instruction set of the native kernels, or "torch".
        threads: of operations on the CPU.
    """

    device: str
    dtype: torch.dtype
    batch_invariant: bool
    linears: LinearOps
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    attention: Attention[Any]
    neurons: Callable[[NeuronTensors], NeuronProduct]
    coded_attention: CodedAttention = field(default_factory=CodedAttention)
    selection: Selection = field(default_factory=Selection)
    isa: str = TORCH
    threads: int = 1


VERSIONS: dict[str, dict[str, Callable[..., object]]] = {
    "linear": {"reference": ReferenceLinear, "torch_cpu": torch_cpu.TorchCpuLinear},
    "rms_norm": {"reference": reference.rms_norm, "torch_cpu": torch_cpu.rms_norm},
    "silu_and_mul": {"reference": reference.silu_and_mul, "torch_cpu": torch_cpu.silu_and_mul},
    "neurons": {
        "reference": partial(ReferenceNeurons, rms_norm=reference.rms_norm),
        "gathered": partial(GatheredNeurons, rms_norm=reference.rms_norm),
    },
    "attention": {
        "reference": lambda device, dtype: ReferenceAttention(device),
        "matmul": lambda device, dtype: PagedAttention(matmul_kernel, device, dtype),
        "flash": lambda device, dtype: PagedAttention(flash_kernel, device, dtype),
    },
}
"""Operation -> version -> function on plain tensors (for linear, neurons and attention: its
constructor).
The cross-tests run every version against "reference"."""


def make_ops(
    device: Device,
    dtype: str,
    *,
    batch_invariant: bool = False,
    threads: int | None = None,
    isa: str = "auto",
) -> Ops:
    """The fastest version of each operation that ``device`` has for ``dtype``.

    Args:
        threads: of operations on the CPU; all cores this process may use if ``None``. With native
            kernels their pool has them, and torch's own operations run in the calling thread: two
            pools that wait for work by spinning would take the cores from each other.
        isa: instruction set of the native kernels: "auto", a name, or "torch" for none.

    Raises:
        ConfigurationError: the instruction set is not there, or these ops have no native kernels.
    """
    kind = DTYPES[dtype]
    count = threads or usable_cores()
    on_cpu = device.name == "cpu"
    native = on_cpu and kind == torch.bfloat16 and not batch_invariant
    if isa not in ("auto", TORCH) and not native:
        raise ConfigurationError(
            f"isa: {isa!r} chooses native kernels, which compute in bfloat16 on the CPU; these "
            f"are {dtype} on {device.name}{' in reference mode' if batch_invariant else ''}"
        )
    context = open_context(isa, count) if native else None
    if on_cpu:
        torch.set_num_threads(1 if context else count)
    if context is not None:
        return native_ops(context)
    fast_cpu = on_cpu and not batch_invariant
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
        linears=torch_cpu.TorchCpuLinear(kind) if fast_cpu else ReferenceLinear(kind),
        rms_norm=torch_cpu.rms_norm if fast_cpu else reference.rms_norm,
        silu_and_mul=torch_cpu.silu_and_mul if fast_cpu else reference.silu_and_mul,
        attention=attention,
        neurons=partial(
            GatheredNeurons, rms_norm=torch_cpu.rms_norm if fast_cpu else reference.rms_norm
        ),
        selection=Selection(strongest=partitioned_strongest) if fast_cpu else Selection(),
        threads=count,
    )


def native_ops(context: _native.Context) -> Ops:
    """The native version of every operation, on one context."""
    return Ops(
        device="cpu",
        dtype=torch.bfloat16,
        batch_invariant=False,
        linears=NativeLinearOps(context),
        rms_norm=partial(native_rms_norm, context),
        silu_and_mul=torch_cpu.silu_and_mul,
        attention=ChosenAttention(
            [NativeAttention(context), PagedAttention(flash_kernel, "cpu", torch.bfloat16)]
        ),
        neurons=partial(native_neurons, context),
        coded_attention=NativeCodedAttention(context),
        selection=Selection(
            partial(native_highest, context),
            partial(native_lowest_kept, context),
            partitioned_strongest,
        ),
        isa=context.isa,
        threads=context.threads,
    )
