"""What ``/metrics`` shows: the engine's own counts, and times of finished requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

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
    "drafts": ("headrace_spec_decode_num_drafts", "Times that tokens were drafted."),
    "draft_tokens": ("headrace_spec_decode_num_draft_tokens", "Tokens drafted."),
    "accepted_tokens": (
        "headrace_spec_decode_num_accepted_tokens",
        "Drafted tokens that were accepted.",
    ),
}
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class ServerMetrics(Collector):
    """The metrics of one server, in a registry of their own.

    Args:
        stats: gives the engine's counts; asked for when the metrics are.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self._registry = CollectorRegistry()
        self._registry.register(self)
        histogram = partial(Histogram, buckets=_SECONDS, registry=self._registry)
        self._first_token = histogram(
            "headrace_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._per_token = histogram(
            "headrace_time_per_output_token_seconds",
            "Between tokens after the first, averaged over a request.",
        )
        self._duration = histogram(
            "headrace_request_duration_seconds", "From a request's arrival to its end."
        )
        self._finished = Counter(
            "headrace_completions_finished",
            "Completions by the reason of their end; a prompt has n of them.",
            ["finish_reason"],
            registry=self._registry,
        )

    def collect(self) -> Iterable[Metric]:
        """The engine's counts."""
        stats = self._stats()
        for field, (name, help_text) in _GAUGES.items():
            yield GaugeMetricFamily(name, help_text, getattr(stats, field))
        for field, (name, help_text) in _COUNTERS.items():
            yield CounterMetricFamily(name, help_text, getattr(stats, field))

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

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
