"""``headrace doctor``: look at the machine and a model, and say what to expect."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from headrace import __version__
from headrace.cli.options import ENGINE_OF_MODEL, Json, takes
from headrace.cli.output import progress, report, show, show_bytes
from headrace.config import EngineConfig
from headrace.errors import ConfigurationError
from headrace.ops import host
from headrace.ops.extension import EMULATED, supported_isas

if TYPE_CHECKING:
    from headrace.ops.device import Device
    from headrace.plan.hardware import HardwareProfile

SLOW_BANDWIDTH = 10e9
"""Bytes per second; less than one channel of current memory delivers."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine, the software that computes on it, and what it would compute with.

    Args:
        kernels: instruction sets of the native kernels that run here, the plainest first; empty
            where the kernels were not built.
    """

    headrace: str
    python: str
    torch: str
    hardware: HardwareProfile
    machine_cores: int
    device: str
    device_memory: int
    threads: int
    kernels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelEstimate:
    """What a model takes and gives here, from its files' headers; no weight is read.

    Args:
        stored_dtype, dtype: of the files, and that would be computed in.
        isa: instruction set of the native kernels that would compute, or "torch".
        weight_format, head_format: of the linear weights in the layers, and of the output head.
        kept: what linear weights are stored as, what they are kept as, and the share of these
            parameters; where they have formats of their own, it is empty.
        weight_bytes: of all parameters in memory.
        kv_token_bytes: KV cache of one token.
        cached_tokens: tokens that fit into the memory left for the KV cache.
        max_model_len: tokens that one sequence may have: the context, cut to that memory.
        problem: why the model could not start; ``None`` if it can.
    """

    name: str
    architecture: str
    num_parameters: int
    weight_format: str
    head_format: str
    stored_dtype: str
    dtype: str
    isa: str
    kept: tuple[tuple[str, str, float], ...]
    weight_bytes: int
    kv_token_bytes: int
    context: int
    cached_tokens: int
    max_model_len: int
    problem: str | None


@takes(engine=ENGINE_OF_MODEL)
def doctor(engine: dict[str, Any], as_json: Json = False) -> None:
    """Show the machine, its measured bandwidth, what MODEL needs, and what could be better."""
    import torch

    from headrace.ops.device import resolve_device
    from headrace.plan.hardware import probe

    config = EngineConfig(**engine)
    device = resolve_device(config.device)
    model = estimate(config, device)
    with progress("measuring the memory bandwidth"):
        hardware = probe()
    machine = Machine(
        headrace=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        hardware=hardware,
        machine_cores=os.cpu_count() or 1,
        device=device.name,
        device_memory=device.free_memory(),
        threads=config.num_threads or hardware.cores,
        kernels=tuple(isa for isa in supported_isas() if isa != EMULATED),
    )
    advice = [*machine_advice(machine), *model_advice(model)]
    report(
        {"machine": asdict(machine), "model": asdict(model), "advice": advice},
        ("machine", ("", "value"), _machine_rows(machine)),
        (f"model {model.name}", ("", "value"), _model_rows(model)),
        as_json=as_json,
    )
    if not as_json:
        print(*(f"- {line}" for line in advice or ["Nothing stands in the way."]), sep="\n")
    if model.problem is not None:
        raise typer.Exit(1)


def estimate(config: EngineConfig, device: Device) -> ModelEstimate:
    """Size up a model from ``config.json`` and the headers of its weight files.

    Raises:
        HeadraceError: the model cannot be found or is not supported.
    """
    from headrace.contracts.cache import layout_of
    from headrace.engine.compose import fit_context
    from headrace.loading import EMBEDDED_NAME, find_model
    from headrace.model_files import open_model
    from headrace.models.base import find_architecture
    from headrace.ops.device import DTYPES
    from headrace.ops.table import make_ops
    from headrace.weights.counting import WeightCounter
    from headrace.weights.formats import WeightPlan
    from headrace.weights.loader import plan_weights
    from headrace.weights.reader import WeightReader

    checkpoint = open_model(find_model(config)).checkpoint
    architecture = find_architecture(checkpoint.config)
    context = architecture.shape(checkpoint.config).context
    dtype = device.choose_dtype("float32" if config.reference else config.dtype, checkpoint.dtype)
    cache_dtype = config.cache_dtype(dtype)
    layout = layout_of(architecture.layer_states(checkpoint.config, cache_dtype), config.block_size)
    plan = plan_weights(checkpoint, WeightPlan.parse(config.weights, config.head_weights))
    ops = make_ops(
        device,
        dtype,
        batch_invariant=config.reference,
        threads=config.num_threads,
        isa=config.isa,
    )
    reader = WeightReader(checkpoint, architecture.load_map)
    counter = WeightCounter(reader, plan, ops.linears, DTYPES[dtype])
    architecture(checkpoint.config, counter, ops)
    weight_bytes = counter.num_bytes
    unchanged = "as stored" if any(kept != dtype for _, kept in counter.kept) else dtype
    free = device.free_memory()
    room = config.kv_cache_memory_bytes
    if room is None:
        room = int(max(0, free - weight_bytes) * config.memory_utilization)
    num_pages = room // layout.page_bytes if layout.groups else 0
    chunk = config.max_num_batched_tokens or device.step_tokens
    max_model_len, problem = 0, None
    try:
        max_model_len = fit_context(config, layout, num_pages, context, chunk)
    except ConfigurationError as error:
        problem = str(error)
    if weight_bytes > free:
        problem = (
            f"the weights take {show_bytes(weight_bytes)} and only {show_bytes(free)} are free; "
            "use a smaller model or free memory"
        )
    return ModelEstimate(
        name=config.model or EMBEDDED_NAME,
        architecture=str(checkpoint.config["model_type"]),
        num_parameters=counter.num_parameters,
        weight_format=plan.body.name if plan.body else unchanged,
        head_format=plan.head.name if plan.head else unchanged,
        stored_dtype=checkpoint.dtype,
        dtype=dtype,
        isa=ops.isa,
        kept=tuple(
            (stored, kept, round(count / counter.kept.total(), 4))
            for (stored, kept), count in counter.kept.most_common()
        ),
        weight_bytes=weight_bytes,
        kv_token_bytes=int(layout.token_bytes),
        context=context,
        cached_tokens=num_pages // max(1, len(layout.groups)) * layout.block_size,
        max_model_len=max_model_len,
        problem=problem,
    )


def _machine_rows(machine: Machine) -> list[tuple[str, Any]]:
    hardware = machine.hardware
    return [
        ("processor", hardware.processor),
        ("cores", f"{hardware.cores} usable of {machine.machine_cores}"),
        ("instruction sets", " ".join(hardware.isa) or "none of interest"),
        ("last-level cache", show_bytes(hardware.last_level_cache)),
        ("free memory", show_bytes(hardware.available_memory)),
        ("memory bandwidth", f"{hardware.memory_bandwidth / 1e9:.1f} GB/s"),
        ("headrace, python, torch", f"{machine.headrace}, {machine.python}, {machine.torch}"),
        ("device", f"{machine.device}, {show_bytes(machine.device_memory)} free"),
        ("threads", str(machine.threads)),
        ("native kernels", ", ".join(reversed(machine.kernels)) or "not built"),
    ]


def _model_rows(model: ModelEstimate) -> list[tuple[str, Any]]:
    return [
        ("architecture", model.architecture),
        ("parameters", show(model.num_parameters)),
        ("stored as, computed in", f"{model.stored_dtype}, {model.dtype} on {model.isa}"),
        ("weights, output head", f"{model.weight_format}, {model.head_format}"),
        *((f"stored as {stored}", f"{share:.1%}: {kept}") for stored, kept, share in model.kept),
        ("bytes of weights", show_bytes(model.weight_bytes)),
        ("KV cache per token", show_bytes(model.kv_token_bytes)),
        ("tokens that fit the KV cache", show(model.cached_tokens)),
        ("context", f"{show(model.max_model_len)} of {show(model.context)} tokens"),
    ]


def machine_advice(machine: Machine) -> Iterator[str]:
    """What is missing on the machine or slow, and what to do about it."""
    hardware = machine.hardware
    if hardware.cores < machine.machine_cores:
        yield (
            f"Only {hardware.cores} of the machine's {machine.machine_cores} cores may be used; "
            "raise the container's CPU quota or the process's affinity."
        )
    if machine.threads > hardware.cores:
        yield (
            f"{machine.threads} threads on {hardware.cores} usable cores get in each other's "
            f"way; use --threads {hardware.cores}."
        )
    if machine.device != "cpu":
        return
    if host.has_gpu_driver():
        yield "A GPU driver is installed but this torch sees no GPU; install torch's GPU build."
    if hardware.memory_bandwidth < SLOW_BANDWIDTH:
        yield (
            f"Memory reads at only {hardware.memory_bandwidth / 1e9:.1f} GB/s, which bounds "
            "decoding; look for other programs that use it."
        )
    if not machine.kernels:
        yield (
            "The native kernels were not built: torch computes instead, slower, and quantized "
            "weights save no time; install a C++20 compiler, then Headrace again."
        )
    if not {"avx512_bf16", "amx_bf16"} & set(hardware.isa) and "avx2" not in machine.kernels:
        yield (
            "The processor has no bfloat16 instructions: half-precision models are computed in "
            "float32, with twice the memory and half the decoding speed."
        )
    elif "amx_bf16" not in hardware.isa:
        yield "The processor has no AMX: prompts are processed several times slower than with it."


def model_advice(model: ModelEstimate) -> Iterator[str]:
    """What keeps the model from running well, and what to do about it."""
    if model.problem is not None:
        yield f"The model cannot start: {model.problem}."
    elif model.max_model_len < model.context:
        yield (
            f"The context is cut from {show(model.context)} to {show(model.max_model_len)} "
            "tokens; --kv-cache-memory or --memory-utilization give it more room."
        )
