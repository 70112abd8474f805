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
from headrace.exec.runner import LocalRunner
from headrace.exec.sampling.sampler import Sampler
from headrace.json_file import read_json
from headrace.kv.arena import KVArena
from headrace.models.base import find_architecture
from headrace.ops.device import Device, resolve_device, set_threads
from headrace.ops.table import make_ops
from headrace.text.tokenizer import Tokenizer
from headrace.weights.hub import resolve_model
from headrace.weights.loader import WeightLoader
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint

EMBEDDED_NAME = "headrace-embedded"

LoadProgress = Callable[[int, int], None]
"""Called with bytes loaded so far and bytes in all."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded.

    Args:
        name: as the user gave it, or the embedded model's name.
        weight_bytes: bytes that the weights take in memory.
        max_model_len: tokens that one sequence may have.
        kv_token_bytes: bytes of KV cache per token.
        num_pages, block_size: pages of the arena, and slots of a page.
    """

    name: str
    path: Path
    architecture: str
    num_parameters: int
    weight_bytes: int
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


def load_engine(config: EngineConfig, progress: LoadProgress | None = None) -> LoadedEngine:
    """Find, check and load a model, size the KV arena, and put the engine together.

    Raises:
        ConfigurationError: an option does not fit the model or the machine.
        CheckpointError: the checkpoint cannot be found, read or understood.
    """
    device = resolve_device(config.device)
    set_threads(config.num_threads)
    directory = (
        embedded_model()
        if config.model is None
        else resolve_model(config.model, config.revision, config.download_dir)
    )
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
    ops = make_ops(device, dtype, batch_invariant=config.reference)
    loader = WeightLoader(checkpoint, ops, _counted(progress, checkpoint.num_bytes))
    model = architecture(checkpoint.config, loader, ops)

    layout = architecture.cache_layout(checkpoint.config, dtype, config.block_size)
    num_pages = size_arena(config, layout, shape.context, device)
    context = fit_context(config, layout, num_pages, shape.context)
    runner = LocalRunner(model, KVArena(layout, num_pages, device.name), ops, Sampler())
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
    )
    info = ModelInfo(
        name=config.model or EMBEDDED_NAME,
        path=directory,
        architecture=str(checkpoint.config["model_type"]),
        num_parameters=loader.num_parameters,
        weight_bytes=loader.num_bytes,
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


def size_arena(config: EngineConfig, layout: CacheLayout, context: int, device: Device) -> int:
    """Pages of the arena: what was asked for, else a share of the memory that is free.

    The share is cut to what the permitted sequences could fill.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes // layout.page_bytes
    share = int(device.free_memory() * config.memory_utilization) // layout.page_bytes
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


def make_config(model: str | None, options: dict[str, Any]) -> EngineConfig:
    """A configuration from keyword arguments. Raises TypeError for unknown ones."""
    return replace(EngineConfig(model=model), **options)
