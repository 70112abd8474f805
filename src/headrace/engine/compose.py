"""The one place where an engine is put together, for real runs and for simulations alike."""

from __future__ import annotations

from headrace.config import EngineConfig
from headrace.contracts.cache import CacheLayout
from headrace.contracts.clock import Clock
from headrace.contracts.kv_policy import KVPolicy
from headrace.contracts.scheduling import StepBudget
from headrace.contracts.step import Runner
from headrace.contracts.text import TextStreamFactory
from headrace.engine.cache_accounting import CacheAccounting
from headrace.engine.engine import Engine, EngineLimits
from headrace.engine.policies import make_policy
from headrace.engine.scheduler import Scheduler
from headrace.errors import ConfigurationError


def fit_context(config: EngineConfig, layout: CacheLayout, num_pages: int, context: int) -> int:
    """Tokens that one sequence may have: the model's ``context``, cut to what the pages hold.

    Raises:
        ConfigurationError: ``max_model_len`` was asked for and exceeds either of them.
    """
    capacity = num_pages // len(layout.groups) * layout.block_size
    wanted = config.max_model_len
    if wanted is not None and wanted > context:
        raise ConfigurationError(
            f"max_model_len: {wanted} exceeds the model's context of {context} tokens"
        )
    if wanted is not None and wanted > capacity:
        raise ConfigurationError(
            f"max_model_len: {wanted} tokens need more KV memory than there is; {num_pages} pages "
            f"hold {capacity}; lower it or raise kv_cache_memory_bytes"
        )
    fitted = min(wanted or context, capacity)
    if fitted < 2:
        raise ConfigurationError(
            f"kv_cache_memory_bytes: {num_pages} pages of {layout.page_bytes} bytes cannot hold "
            "one sequence; raise it"
        )
    return fitted


def compose_engine(
    config: EngineConfig,
    *,
    layout: CacheLayout,
    num_pages: int,
    max_num_batched_tokens: int,
    limits: EngineLimits,
    runner: Runner,
    clock: Clock,
    text: TextStreamFactory | None = None,
    kv_policy: KVPolicy | None = None,
) -> Engine:
    """Wire policy, accounting, scheduler, runner and clock into an engine."""
    accounting = CacheAccounting(
        layout,
        num_pages,
        config.max_num_seqs,
        limits.max_model_len,
        config.enable_prefix_caching,
        kv_policy,
        max_num_batched_tokens,
    )
    scheduler = Scheduler(
        make_policy(config.scheduling_policy),
        accounting,
        StepBudget(max_num_batched_tokens, config.max_num_seqs),
    )
    return Engine(scheduler, runner, clock, limits, text, config.seed)
