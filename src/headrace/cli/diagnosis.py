"""What ``headrace doctor`` finds out: the machine, what would be used, the model, what to do."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.cli.output import show, show_bytes
from headrace.config import EngineConfig
from headrace.contracts.cache import ITEM_BYTES
from headrace.errors import ConfigurationError
from headrace.ops import host
from headrace.plan.hardware import HardwareProfile, probe

if TYPE_CHECKING:
    from headrace.ops.device import Device

SLOW_BANDWIDTH = 10e9
"""Bytes per second; less than one channel of current memory delivers."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine, the software that computes on it, and what it would compute with."""

    headrace: str
    python: str
    torch: str
    hardware: HardwareProfile
    machine_cores: int
    device: str
    device_memory: int
    threads: int


@dataclass(frozen=True, slots=True)
class ModelEstimate:
    """What a model takes and gives here, from its files' headers; no weight is read.

    Args:
        stored_dtype, dtype: of the files, and that would be computed in.
        weight_bytes: in ``dtype``.
        kv_token_bytes: KV cache of one token.
        cached_tokens: tokens that fit into the memory left for the KV cache.
        max_model_len: tokens that one sequence may have: the context, cut to that memory.
        decode_tokens_per_second: what the memory bandwidth permits one sequence with a short
            context: per token every weight is read once, but for an embedding that is only
            looked up. ``None`` where the bandwidth does not bound it or was not measured: the
            weights fit the cache, or the device is not the CPU.
        problem: why the model could not start; ``None`` if it can.
    """

    name: str
    architecture: str
    num_parameters: int
    stored_dtype: str
    dtype: str
    weight_bytes: int
    kv_token_bytes: int
    context: int
    cached_tokens: int
    max_model_len: int
    decode_tokens_per_second: float | None
    problem: str | None


def examine(config: EngineConfig) -> tuple[Machine, ModelEstimate, list[str]]:
    """The machine, the model, and advice: what is missing or slow, and what to do about it.

    Raises:
        HeadraceError: the model cannot be found or is not supported.
    """
    import torch

    from headrace.ops.device import resolve_device

    device = resolve_device(config.device)
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
    )
    model = estimate(config, device, machine)
    return machine, model, [*machine_advice(machine), *model_advice(model)]


def estimate(config: EngineConfig, device: Device, machine: Machine) -> ModelEstimate:
    """Size up a model from ``config.json`` and the headers of its weight files."""
    from headrace.engine.compose import fit_context
    from headrace.loading import EMBEDDED_NAME, embedded_model
    from headrace.models.base import find_architecture
    from headrace.weights.hub import resolve_model
    from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint

    if config.model is None:
        directory = embedded_model()
    else:
        directory = resolve_model(config.model, config.revision, config.download_dir)
    checkpoint = SafetensorsCheckpoint(directory)
    architecture = find_architecture(checkpoint.config)
    context = architecture.shape(checkpoint.config).context
    dtype = device.choose_dtype("float32" if config.reference else config.dtype, checkpoint.dtype)
    layout = architecture.cache_layout(checkpoint.config, dtype, config.block_size)
    sizes = _tensor_sizes(directory)
    weight_bytes = sum(sizes.values()) * ITEM_BYTES[dtype]
    looked_up = sizes.get("model.embed_tokens.weight", 0) if "lm_head.weight" in sizes else 0
    room = config.kv_cache_memory_bytes
    if room is None:
        room = int(max(0, machine.device_memory - weight_bytes) * config.memory_utilization)
    num_pages = room // layout.page_bytes
    max_model_len, problem = 0, None
    if weight_bytes > machine.device_memory:
        problem = (
            f"the weights take {show_bytes(weight_bytes)} and only "
            f"{show_bytes(machine.device_memory)} are free; use a smaller model or free memory"
        )
    else:
        try:
            max_model_len = fit_context(config, layout, num_pages, context)
        except ConfigurationError as error:
            problem = str(error)
    return ModelEstimate(
        name=config.model or EMBEDDED_NAME,
        architecture=str(checkpoint.config["model_type"]),
        num_parameters=sum(sizes.values()),
        stored_dtype=checkpoint.dtype,
        dtype=dtype,
        weight_bytes=weight_bytes,
        kv_token_bytes=int(layout.token_bytes),
        context=context,
        cached_tokens=num_pages // len(layout.groups) * layout.block_size,
        max_model_len=max_model_len,
        decode_tokens_per_second=_decode_bound(
            machine, weight_bytes - looked_up * ITEM_BYTES[dtype]
        ),
        problem=problem,
    )


def _decode_bound(machine: Machine, bytes_per_token: int) -> float | None:
    hardware = machine.hardware
    if machine.device != "cpu" or bytes_per_token <= hardware.last_level_cache:
        return None
    return hardware.memory_bandwidth / bytes_per_token


def _tensor_sizes(directory: Path) -> dict[str, int]:
    """Tensor -> number of elements, over all weight files."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            sizes |= {name: math.prod(file.get_slice(name).get_shape()) for name in names}
    return sizes


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
    if not {"avx512_bf16", "amx_bf16"} & set(hardware.isa):
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
    if model.dtype == "float32" and model.stored_dtype != "float32":
        yield (
            f"The weights are stored as {model.stored_dtype} and computed in float32; a device "
            "with fast arithmetic for it would need half the memory."
        )
