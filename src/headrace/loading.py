"""From a configuration to an engine that runs: the one place that knows every room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from headrace.config import EngineConfig
from headrace.contracts.cache import CacheLayout, LayerState, layout_of
from headrace.contracts.method import Method, ModelFacts, of_kind
from headrace.contracts.slot_policy import SlotPolicy
from headrace.embedding import EmbeddingSettings
from headrace.engine.clock import MonotonicClock
from headrace.engine.compose import compose_engine, fit_context, shares_prefixes
from headrace.engine.engine import Engine, EngineLimits
from headrace.errors import ConfigurationError
from headrace.exec.extensions import Extensions
from headrace.exec.forward import Forward, LoadedModel
from headrace.exec.runner import LocalRunner
from headrace.exec.sampling.sampler import Sampler
from headrace.exec.slot_statistics import SlotStatistics
from headrace.kv.arena import KVArena
from headrace.methods import MethodSet, configured_methods
from headrace.model_files import ModelFiles, open_model, read_tokenizer
from headrace.models.base import DecoderModel, ModelShape, find_architecture
from headrace.ops.device import Device, resolve_device
from headrace.ops.scale_search import make_scale_search
from headrace.ops.table import Ops, make_ops
from headrace.placing import Placing
from headrace.text.tokenizer import Tokenizer
from headrace.weights.adapters import AdapterBank
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.formats import WeightPlan
from headrace.weights.hub import is_gguf, resolve_model
from headrace.weights.loader import CheckpointLoader, make_loader
from headrace.weights.neurons import NeuronLoader
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
        page_bytes: of a page, which holds what one group of layers keeps of its slots.
        prefix_caching: whether equal prefixes are computed once.
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
    page_bytes: int
    prefix_caching: bool


@dataclass(slots=True)
class LoadedEngine:
    """An engine and what belongs to it. ``generation_defaults`` are sampling parameters."""

    engine: Engine
    tokenizer: Tokenizer
    info: ModelInfo
    generation_defaults: dict[str, Any]
    pooling: EmbeddingSettings
    adapters: AdapterBank
    methods: MethodSet


def embedded_model() -> Path:
    """Directory of the model that ships with the package."""
    return Path(str(resources.files("headrace") / "assets" / "embedded"))


def find_model(config: EngineConfig) -> Path:
    """Directory of the model that is asked for; the embedded one's if none is."""
    if config.model is None:
        return embedded_model()
    return resolve_model(config.model, config.revision, config.download_dir)


@dataclass(frozen=True, slots=True)
class _Source:
    """What is to be loaded, and the operations that it is loaded for."""

    files: ModelFiles
    architecture: type[DecoderModel]
    shape: ModelShape
    states: tuple[LayerState, ...]
    tokenizer: Tokenizer
    device: Device
    dtype: str
    ops: Ops
    plan: WeightPlan

    @property
    def checkpoint(self) -> Checkpoint:
        return self.files.checkpoint


def _open_source(config: EngineConfig) -> _Source:
    device = resolve_device(config.device)
    plan = WeightPlan.parse(config.weights, config.head_weights)
    files = open_model(find_model(config))
    source = files.checkpoint.config
    architecture = find_architecture(source)
    shape = architecture.shape(source)
    tokenizer = find_tokenizer(config, files)
    wanted = "float32" if config.reference else config.dtype
    dtype = device.choose_dtype(wanted, files.checkpoint.dtype)
    ops = make_ops(
        device,
        dtype,
        batch_invariant=config.reference,
        threads=config.num_threads,
        isa=config.isa,
    )
    states = tuple(architecture.layer_states(source, config.cache_dtype(dtype)))
    return _Source(files, architecture, shape, states, tokenizer, device, dtype, ops, plan)


def load_engine(config: EngineConfig, progress: LoadProgress | None = None) -> LoadedEngine:
    """Find, check and load a model, size the KV arena, and put the engine together.

    Raises:
        ConfigurationError: an option does not fit the model or the machine.
        CheckpointError: the checkpoint cannot be found, read or understood.
    """
    wanted = configured_methods(config)
    with ExitStack() as opened:
        loaded = _load(config, wanted, progress, opened)
        opened.pop_all()
    return loaded


def _load(
    config: EngineConfig,
    wanted: Sequence[Method],
    progress: LoadProgress | None,
    opened: ExitStack,
) -> LoadedEngine:
    """See ``load_engine``; ``opened`` closes what a failure leaves behind."""
    source = _open_source(config)
    checkpoint, architecture, device = source.checkpoint, source.architecture, source.device
    chunk = step_inputs(config, device, source.shape.context, architecture.causal)
    methods = MethodSet(wanted, model_facts(source, config, chunk))
    layout = layout_of(source.states, config.block_size, methods.stages)
    prefix_caching = shares_prefixes(config, layout, architecture.causal)
    placing = Placing(methods.methods, source.ops)
    opened.callback(placing.close)
    placing.decide(config, checkpoint, architecture, source.plan, layout, chunk)
    counted = _counted(progress, checkpoint.num_bytes)
    loader = make_loader(checkpoint, architecture.load_map, placing.ops, source.plan, counted)
    read = config_for(checkpoint.config, config.max_model_len)
    model = architecture(read, loader, source.ops)
    placing.weights_are_loaded()
    by_neuron = NeuronLoader(checkpoint, architecture.load_map, source.ops, loader.plan)
    neurons = methods.open_neurons(model, by_neuron, source.ops.selection)
    loader.num_bytes += neurons.num_bytes if neurons else 0
    depth = methods.open_depth(model, source.ops)
    planes = [part.planes for part in (neurons, depth) if part]
    layout = replace(layout, method_states=tuple(chain(*planes)))
    num_pages = placing.num_pages
    if num_pages is None:
        num_pages = size_arena(
            config, layout, source.shape.context, chunk, device, loader.mapped_bytes
        )
    context = fit_context(config, layout, num_pages, source.shape.context, chunk)
    arena = placing.make_arena(layout, num_pages, device.name, config.max_num_seqs)
    extensions = Extensions(loader.bank.routes, neurons=neurons, depth=depth, placed=placing.placed)
    forward = Forward(model, arena, source.ops, extensions)
    load_second = partial(_load_second, config, source)
    runner = make_runner(forward, methods, load_second, config.max_num_seqs, context)
    limits = engine_limits(config, source, context)
    engine = compose_engine(
        config,
        layout=layout,
        num_pages=num_pages,
        max_num_batched_tokens=chunk,
        limits=limits,
        runner=runner,
        clock=MonotonicClock(),
        text=source.tokenizer.stream,
        causal=architecture.causal,
    )
    info = ModelInfo(
        name=config.model or EMBEDDED_NAME,
        path=source.files.path,
        architecture=str(checkpoint.config["model_type"]),
        **weight_facts(loader, source.dtype),
        **cache_facts(layout, num_pages),
        dtype=source.dtype,
        device=device.name,
        max_model_len=context,
        vocab_size=source.shape.vocab_size,
        eos_token_ids=limits.eos_token_ids,
        prefix_caching=prefix_caching,
    )
    defaults = _sampling_defaults(source.files.generation)
    pooling = source.files.read_pooling(architecture.causal)
    return LoadedEngine(engine, source.tokenizer, info, defaults, pooling, loader.bank, methods)


def engine_limits(config: EngineConfig, source: _Source, context: int) -> EngineLimits:
    """What requests are checked against, ``context`` tokens among them."""
    ends = _end_tokens(source.checkpoint.config, source.files.generation, source.tokenizer)
    return EngineLimits(
        max_model_len=context,
        max_num_waiting=config.max_num_waiting,
        vocab_size=source.shape.vocab_size,
        eos_token_ids=ends,
        generates=source.architecture.causal,
    )


def make_runner(
    forward: Forward,
    methods: MethodSet,
    load_second: Callable[[str], LoadedModel],
    num_rows: int,
    context: int,
) -> LocalRunner:
    """What executes steps, with all that methods need made ready.

    Raises:
        ConfigurationError: a method does not fit the model.
    """
    sampler = Sampler(selection=forward.ops.selection)
    methods.open_taps(forward)
    forward.extensions.taps = methods.taps
    forward.extensions.statistics = make_statistics(methods, forward.arena, context, num_rows)
    methods.open_drafters(forward, sampler, load_second, num_rows, context)
    return LocalRunner(forward, sampler, methods.drafters)


def make_statistics(
    methods: MethodSet, arena: KVArena, context: int, num_rows: int
) -> SlotStatistics | None:
    """What policies of slots need beside the arena; ``None`` without such."""
    found = of_kind(methods.methods, SlotPolicy)
    if not found:
        return None
    schedules = [policy.schedule(arena.layout.block_size) for policy in found]
    return SlotStatistics(arena, num_rows, max(each.most_slots(context) for each in schedules))


def _load_second(config: EngineConfig, first: _Source, name: str) -> LoadedModel:
    """Another model, on the operations of the first. Raises ValueError if its tokens are others."""
    files = open_model(resolve_model(name, None, config.download_dir))
    other, source = files.read_tokenizer(), files.checkpoint.config
    ours = [first.tokenizer.token_text(token) for token in range(first.tokenizer.vocab_size)]
    theirs = [other.token_text(token) for token in range(other.vocab_size)]
    if ours != theirs:
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        raise ValueError(
            f"model: {name} has other tokens than the engine's model, the first of them {place}; "
            "choose one with the same tokenizer"
        )
    architecture = find_architecture(source)
    if not architecture.causal:
        raise ValueError(f"model: {name} does not generate")
    shape = architecture.shape(source)
    states = architecture.layer_states(source, config.cache_dtype(first.dtype))
    loader = make_loader(files.checkpoint, architecture.load_map, first.ops, first.plan)
    model = architecture(source, loader, first.ops)
    return LoadedModel(model, first.ops, tuple(states), shape.context, config.block_size)


def model_facts(source: _Source, config: EngineConfig, chunk: int) -> ModelFacts:
    """What methods may ask of a model, of which a step has ``chunk`` inputs."""
    return ModelFacts(
        source.states,
        source.shape.context,
        source.shape.vocab_size,
        source.architecture.causal,
        config.block_size,
        source.architecture.rotary_attention,
        # Each of the other sequences may have one.
        max(1, chunk - config.max_num_seqs + 1),
    )


def find_tokenizer(config: EngineConfig, files: ModelFiles) -> Tokenizer:
    """The tokenizer that is asked for; the model's own if none is."""
    if config.tokenizer is None:
        return files.read_tokenizer()
    return read_tokenizer(resolve_model(config.tokenizer, None, config.download_dir, weights=False))


def weight_facts(loader: CheckpointLoader, dtype: str) -> dict[str, Any]:
    """What a ``ModelInfo`` says of weights; kinds that stay as stored, the most common first."""
    kept = ", ".join(kind for kind, _ in loader.kept.most_common())
    body, head = loader.plan.body, loader.plan.head
    return {
        "num_parameters": loader.num_parameters,
        "weight_bytes": loader.num_bytes,
        "weight_format": body.name if body else kept or dtype,
        "head_format": head.name if head else loader.head_kept or dtype,
        "head_bytes": loader.head_bytes,
    }


def cache_facts(layout: CacheLayout, num_pages: int) -> dict[str, Any]:
    """What a ``ModelInfo`` says of the KV cache."""
    return {
        "kv_token_bytes": int(layout.token_bytes),
        "num_pages": num_pages,
        "block_size": layout.block_size,
        "page_bytes": layout.page_bytes,
    }


def config_for(config: dict[str, Any], max_model_len: int | None) -> dict[str, Any]:
    """``config.json`` with the context that it may have been cut to, which RoPE may depend on."""
    return config if max_model_len is None else {**config, "max_model_len": max_model_len}


def step_inputs(config: EngineConfig, device: Device, context: int, causal: bool) -> int:
    """Inputs of a step at most; a model that is not causal is fed whole texts."""
    chunk = config.max_num_batched_tokens or device.step_tokens
    return chunk if causal else max(chunk, config.max_model_len or context)


def size_arena(
    config: EngineConfig,
    layout: CacheLayout,
    context: int,
    chunk: int,
    device: Device,
    mapped_bytes: int,
) -> int:
    """Pages of the arena: what was asked for, else a share of the memory that is free.

    The share is cut to what the permitted sequences could fill. The system counts the memory of
    mapped files as available, and here it is not: ``mapped_bytes`` are taken off.
    """
    if not layout.groups:
        return 0
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes // layout.page_bytes
    taken = mapped_bytes + layout.state_bytes * config.max_num_seqs
    free = max(0, device.free_memory() - taken)
    share = int(free * config.memory_utilization) // layout.page_bytes
    longest = layout.pages_to_hold(config.max_model_len or context, chunk)
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
    path = find_model(config)
    if is_gguf(path):
        raise ConfigurationError(
            f"model: {path} is a GGUF file; quantize the checkpoint that it was converted from, or "
            "use --weights when it is loaded"
        )
    source = SafetensorsCheckpoint(path)
    architecture = find_architecture(source.config)
    ops = make_ops(resolve_device("cpu"), "bfloat16", threads=config.num_threads)
    quantization = make_quantizer(make_scale_search(ops.threads), quantizer)
    counted = _counted(progress, source.num_bytes)
    with packed_checkpoint(
        source,
        architecture.load_map,
        output,
        plan,
        quantization,
        force=force,
        progress=counted,
    ) as packer:
        architecture(source.config, packer, ops)
    return packer.summary()


def make_config(model: str | None, options: dict[str, Any]) -> EngineConfig:
    """A configuration from keyword arguments. Raises TypeError for unknown ones."""
    return replace(EngineConfig(model=model), **options)
