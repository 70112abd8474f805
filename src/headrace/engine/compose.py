"""The one place where an engine is put together, for real runs and for simulations alike."""

from __future__ import annotations

from bisect import bisect_right

from headrace.config import EngineConfig
from headrace.contracts.cache import CacheLayout
from headrace.contracts.clock import Clock
from headrace.contracts.scheduling import StepBudget
from headrace.contracts.step import Runner
from headrace.contracts.text import TextStreamFactory
from headrace.engine.cache_accounting import CacheAccounting
from headrace.engine.engine import Engine, EngineLimits
from headrace.engine.policies import make_policy
from headrace.engine.scheduler import Scheduler
from headrace.errors import ConfigurationError


def fit_context(
    config: EngineConfig, layout: CacheLayout, num_pages: int, context: int, chunk: int
) -> int:
    """Tokens that one sequence may have: the model's ``context``, cut to what the pages hold.

    ``chunk`` inputs may share a step.

    Raises:
        ConfigurationError: ``max_model_len`` was asked for and exceeds either of them.
    """
    needed = range(context + 1)
    capacity = bisect_right(needed, num_pages, key=lambda n: layout.pages_to_hold(n, chunk)) - 1
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


def shares_prefixes(config: EngineConfig, layout: CacheLayout, causal: bool) -> bool:
    """Whether equal prefixes are computed once.

    Raises:
        ConfigurationError: that is asked for, and the model does not allow it.
    """
    reason = None
    if not causal:
        reason = "what this model computes for a token depends on those behind it"
    elif layout.states:
        reason = (
            "layers of this model keep one recurrent state for a whole sequence, of which there "
            "are no snapshots"
        )
    if config.enable_prefix_caching and reason is not None:
        raise ConfigurationError(f"enable_prefix_caching: {reason}; leave the option out")
    return config.enable_prefix_caching is not False and reason is None


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
    causal: bool = True,
) -> Engine:
    """Wire policy, accounting, scheduler, runner and clock into an engine.

    Args:
        causal: whether a token is computed from those before it alone; else a prompt is fed whole,
            and what it has in common with another is not shared.
    """
    accounting = CacheAccounting(
        layout,
        num_pages,
        config.max_num_seqs,
        limits.max_model_len,
        shares_prefixes(config, layout, causal),
        max_num_batched_tokens,
    )
    scheduler = Scheduler(
        make_policy(config.scheduling_policy),
        accounting,
        StepBudget(max_num_batched_tokens, config.max_num_seqs),
        whole_prompts=not causal,
    )
    return Engine(scheduler, runner, clock, limits, text, config.seed)
