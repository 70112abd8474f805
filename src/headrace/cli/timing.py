"""How long a request took, from its metrics."""

from __future__ import annotations

from headrace.cli.output import show
from headrace.contracts.outputs import RequestOutput


def timing(output: RequestOutput) -> dict[str, float]:
    """Figures of a finished request: seconds, and tokens per second; 0 where not defined.

    ``prompt_tokens`` counts those that were computed, not those found in the prefix cache.
    """
    metrics = output.metrics
    assert metrics is not None
    prompt_tokens = len(output.prompt_token_ids) - metrics.num_cached_tokens
    output_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    decoded = output_tokens - len(output.outputs)
    waited = prefilling = decoding = 0.0
    start, first = metrics.first_scheduled_time, metrics.first_token_time
    if start is not None and first is not None and metrics.finished_time is not None:
        waited = first - metrics.arrival_time
        prefilling = first - start
        decoding = metrics.finished_time - first
    return {
        "prompt_tokens": prompt_tokens,
        "cached_tokens": metrics.num_cached_tokens,
        "output_tokens": output_tokens,
        "time_to_first_token": waited,
        "time_per_output_token": _ratio(decoding, decoded),
        "prefill_tokens_per_second": _ratio(prompt_tokens, prefilling),
        "decode_tokens_per_second": _ratio(decoded, decoding),
    }


def describe(figures: dict[str, float]) -> str:
    """A request's ``timing`` in one line."""
    prompt, cached, output, first, _, prefill, decode = figures.values()
    return (
        f"prompt {prompt + cached} tokens ({cached} cached, {show(prefill)} tok/s),"
        f" output {output} tokens ({show(decode)} tok/s), first token after {show(first * 1000)} ms"
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else 0.0
