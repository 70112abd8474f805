"""From a configuration to an engine that runs: the one place that knows every room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from headrace.config import EngineConfig
from headrace.contracts.cache import CacheLayout
from headrace.engine.clock import MonotonicClock
from headrace.engine.compose import compose_engine, fit_context
from headrace.engine.engine import Engine, EngineLimits
from headrace.errors import ConfigurationError
from headrace.exec.runner import LocalRunner
from headrace.exec.sampling.sampler import Sampler
from headrace.json_file import read_json
from headrace.kv.arena import KVArena
from headrace.kv.policies import make_kv_policy
from headrace.models.base import find_architecture
from headrace.ops.device import Device, resolve_device
from headrace.ops.scale_search import make_scale_search
from headrace.ops.table import make_ops
from headrace.text.tokenizer import Tokenizer
from headrace.weights.formats import WeightPlan
from headrace.weights.hub import resolve_model
from headrace.weights.loader import make_loader
from headrace.weights.packing import PackedModel, packed_checkpoint
from headrace.weights.quantizers import DEFAULT_QUANTIZER, make_quantizer
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint

EMBEDDED_NAME = "headrace-embedded"

LoadProgress = Callable[[int, int], None]
"""Called with bytes loaded so far and bytes in all."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded.

    Args:
        name: as the user gave it, or the embedded model's name.
        weight_bytes: bytes that the weights take in memory, the output head's included.
        weight_format, head_format: of the linear weights in the layers, and of the output head.
        head_bytes: bytes of the output head.
        max_model_len: tokens that one sequence may have.
        kv_token_bytes: bytes of KV cache per token.
        num_pages, block_size: pages of the arena, and slots of a page.
    """

    name: str
    path: Path
    architecture: str
    num_parameters: int
    weight_bytes: int
    weight_format: str
    head_format: str
    head_bytes: int
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_token_bytes: int
    num_pages: int
    block_size: int


@dataclass(slots=True)
class LoadedEngine:
    """An engine and what belongs to it. ``generation_defaults`` are sampling parameters."""

    engine: Engine
    tokenizer: Tokenizer
    info: ModelInfo
    generation_defaults: dict[str, Any]


def embedded_model() -> Path:
    """Directory of the model that ships with the package."""
    return Path(str(resources.files("headrace") / "assets" / "embedded"))


def find_model(config: EngineConfig) -> Path:
    """Directory of the model that is asked for; the embedded one's if none is."""
    if config.model is None:
        return embedded_model()
    return resolve_model(config.model, config.revision, config.download_dir)


def load_engine(config: EngineConfig, progress: LoadProgress | None = None) -> LoadedEngine:
    """Find, check and load a model, size the KV arena, and put the engine together.

    Raises:
        ConfigurationError: an option does not fit the model or the machine.
        CheckpointError: the checkpoint cannot be found, read or understood.
    """
    device = resolve_device(config.device)
    plan = WeightPlan.parse(config.weights, config.head_weights)
    kv_policy = make_kv_policy(config.kv)
    directory = find_model(config)
    checkpoint = SafetensorsCheckpoint(directory)
    architecture = find_architecture(checkpoint.config)
    shape = architecture.shape(checkpoint.config)
    tokenizer = Tokenizer(
        resolve_model(config.tokenizer, None, config.download_dir, weights=False)
        if config.tokenizer
        else directory
    )
    wanted = "float32" if config.reference else config.dtype
    dtype = device.choose_dtype(wanted, checkpoint.dtype)
    ops = make_ops(
        device,
        dtype,
        batch_invariant=config.reference,
        threads=config.num_threads,
        isa=config.isa,
    )
    loader = make_loader(checkpoint, ops, plan, _counted(progress, checkpoint.num_bytes))
    model = architecture(checkpoint.config, loader, ops)

    cache_dtype = config.cache_dtype(dtype)
    layout = architecture.cache_layout(checkpoint.config, cache_dtype, config.block_size)
    num_pages = size_arena(config, layout, shape.context, device, loader.mapped_bytes)
    context = fit_context(config, layout, num_pages, shape.context)
    sampler = Sampler(selection=ops.selection)
    runner = LocalRunner(model, KVArena(layout, num_pages, device.name), ops, sampler)
    generation = read_json(directory / "generation_config.json", required=False)
    limits = EngineLimits(
        max_model_len=context,
        max_num_waiting=config.max_num_waiting,
        vocab_size=shape.vocab_size,
        eos_token_ids=_end_tokens(checkpoint.config, generation, tokenizer),
    )
    engine = compose_engine(
        config,
        layout=layout,
        num_pages=num_pages,
        max_num_batched_tokens=config.max_num_batched_tokens or device.step_tokens,
        limits=limits,
        runner=runner,
        clock=MonotonicClock(),
        text=tokenizer.stream,
        kv_policy=kv_policy,
    )
    info = ModelInfo(
        name=config.model or EMBEDDED_NAME,
        path=directory,
        architecture=str(checkpoint.config["model_type"]),
        num_parameters=loader.num_parameters,
        weight_bytes=loader.num_bytes,
        weight_format=loader.plan.body.name if loader.plan.body else dtype,
        head_format=loader.plan.head.name if loader.plan.head else dtype,
        head_bytes=loader.head_bytes,
        dtype=dtype,
        device=device.name,
        max_model_len=context,
        vocab_size=shape.vocab_size,
        eos_token_ids=limits.eos_token_ids,
        kv_token_bytes=int(layout.token_bytes),
        num_pages=num_pages,
        block_size=config.block_size,
    )
    return LoadedEngine(engine, tokenizer, info, _sampling_defaults(generation))


def size_arena(
    config: EngineConfig, layout: CacheLayout, context: int, device: Device, mapped_bytes: int
) -> int:
    """Pages of the arena: what was asked for, else a share of the memory that is free.

    The share is cut to what the permitted sequences could fill. The system counts the memory of
    mapped files as available, and here it is not: ``mapped_bytes`` are taken off.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes // layout.page_bytes
    free = max(0, device.free_memory() - mapped_bytes)
    share = int(free * config.memory_utilization) // layout.page_bytes
    longest = layout.pages_for(config.max_model_len or context) * len(layout.groups)
    return min(share, longest * config.max_num_seqs)


def _counted(progress: LoadProgress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance


def _end_tokens(
    config: dict[str, Any], generation: dict[str, Any], tokenizer: Tokenizer
) -> tuple[int, ...]:
    """End-of-sequence tokens by every file that names some."""
    found: set[int] = set()
    for value in (
        config.get("eos_token_id"),
        generation.get("eos_token_id"),
        tokenizer.eos_token_id,
    ):
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, list):
            found.update(value)
    return tuple(sorted(found))


def _sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that ``generation_config.json`` recommends."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: generation[name] for name in names if generation.get(name) is not None}


def quantize_model(
    config: EngineConfig,
    output: Path,
    quantizer: str = DEFAULT_QUANTIZER,
    *,
    force: bool = False,
    progress: LoadProgress | None = None,
) -> PackedModel:
    """Write a packed checkpoint of a plain one, in the formats that ``config`` names.

    Args:
        output: directory to write.
        force: replace the checkpoint in it.

    Raises:
        ConfigurationError: a format or the quantizer is unknown, or ``output`` is in use.
        CheckpointError: the model cannot be read, or ``output`` not be written.
    """
    plan = WeightPlan.parse(config.weights, config.head_weights)
    if plan.body is None:
        raise ConfigurationError("weights: name a format to store the weights in")
    source = SafetensorsCheckpoint(find_model(config))
    architecture = find_architecture(source.config)
    ops = make_ops(resolve_device("cpu"), "bfloat16", threads=config.num_threads)
    quantization = make_quantizer(make_scale_search(ops.threads), quantizer)
    counted = _counted(progress, source.num_bytes)
    with packed_checkpoint(
        source, output, plan, quantization, force=force, progress=counted
    ) as packer:
        architecture(source.config, packer, ops)
    return packer.summary()


def make_config(model: str | None, options: dict[str, Any]) -> EngineConfig:
    """A configuration from keyword arguments. Raises TypeError for unknown ones."""
    return replace(EngineConfig(model=model), **options)
