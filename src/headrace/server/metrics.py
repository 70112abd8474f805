"""What ``/metrics`` shows: the engine's own counts, and times of finished requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.contracts.outputs import RequestOutput
from headrace.contracts.stats import EngineStats

_GAUGES = {
    "waiting": ("headrace_requests_waiting", "Sequences in the queue (n per prompt)."),
    "running": ("headrace_requests_running", "Sequences that hold a place in the batch."),
    "pages_used": ("headrace_pages_used", "KV pages that sequences hold."),
    "pages_cached": ("headrace_pages_cached", "KV pages that only the prefix cache holds."),
    "pages_total": ("headrace_pages_total", "KV pages in all."),
}
_COUNTERS = {
    "prefix_query_tokens": ("headrace_prefix_query_tokens", "Prompt tokens looked up."),
    "prefix_hit_tokens": ("headrace_prefix_hit_tokens", "Prompt tokens found in the cache."),
    "preemptions": ("headrace_preemptions", "Times that a sequence lost its pages."),
    "prompt_tokens": ("headrace_prompt_tokens", "Tokens of admitted prompts."),
    "generation_tokens": ("headrace_generation_tokens", "Tokens generated."),
    "steps": ("headrace_steps", "Steps of the engine."),
    "aborted": ("headrace_requests_aborted", "Requests given up by their clients."),
    "failed": ("headrace_requests_failed", "Requests that failed while running."),
}
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class EngineCollector(Collector):
    """Reads the engine's counts when they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for field, (name, help_text) in _GAUGES.items():
            yield GaugeMetricFamily(name, help_text, getattr(stats, field))
        for field, (name, help_text) in _COUNTERS.items():
            yield CounterMetricFamily(name, help_text, getattr(stats, field))


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(stats))
        self._first_token = Histogram(
            "headrace_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "headrace_time_per_output_token_seconds",
            "Between tokens after the first, averaged over a request.",
            buckets=_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._duration = Histogram(
            "headrace_request_duration_seconds",
            "From a request's arrival to its end.",
            buckets=_REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._finished = Counter(
            "headrace_completions_finished",
            "Completions by the reason of their end; a prompt has n of them.",
            ["finish_reason"],
            registry=self._registry,
        )

    def observe(self, output: RequestOutput) -> None:
        """Record a request that ran to its end."""
        for completion in output.outputs:
            self._finished.labels(completion.finish_reason).inc()
        times = output.metrics
        if times is None or times.finished_time is None:
            return
        self._duration.observe(times.finished_time - times.arrival_time)
        if times.first_token_time is not None:
            self._first_token.observe(times.first_token_time - times.arrival_time)
            later = max(len(completion.token_ids) for completion in output.outputs) - 1
            if later > 0:
                self._per_token.observe((times.finished_time - times.first_token_time) / later)

    def observe_cut(self, reason: str, completions: int) -> None:
        """Record completions that ended by "abort" or "error"."""
        self._finished.labels(reason).inc(completions)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
