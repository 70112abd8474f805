"""How long a request took, from its metrics; percentiles of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from headrace.cli.output import show
from headrace.contracts.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class Timing:
    """One finished request. Times in seconds, rates in tokens per second; 0 where not defined.

    ``prompt_tokens`` counts those that were computed, not those found in the prefix cache.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    time_to_first_token: float
    time_per_output_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float

    @classmethod
    def of(cls, output: RequestOutput) -> Timing:
        """Read the timing of a finished request."""
        metrics = output.metrics
        assert metrics is not None
        cached = metrics.num_cached_tokens
        prompt = len(output.prompt_token_ids) - cached
        generated = sum(len(completion.token_ids) for completion in output.outputs)
        first, start = metrics.first_token_time, metrics.first_scheduled_time
        if first is None or start is None or metrics.finished_time is None:
            return cls(prompt, cached, generated, 0.0, 0.0, 0.0, 0.0)
        decoded = generated - len(output.outputs)
        decode_time = metrics.finished_time - first
        return cls(
            prompt,
            cached,
            generated,
            first - metrics.arrival_time,
            _ratio(decode_time, decoded),
            _ratio(prompt, first - start),
            _ratio(decoded, decode_time),
        )

    def describe(self) -> str:
        """One line for people."""
        return (
            f"prompt {self.prompt_tokens + self.cached_tokens} tokens"
            f" ({self.cached_tokens} cached, {show(self.prefill_tokens_per_second)} tok/s),"
            f" output {self.output_tokens} tokens ({show(self.decode_tokens_per_second)} tok/s),"
            f" first token after {show(self.time_to_first_token * 1000)} ms"
        )

    def as_dict(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of ``values`` lie, linearly interpolated."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile; zeros when there is nothing."""
    if not values:
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    return {
        "mean": sum(values) / len(values),
        "p50": percentile(values, 0.5),
        "p99": percentile(values, 0.99),
    }
