"""Pictures of evaluations: quality against memory, and against speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headrace.errors import ConfigurationError

AXES: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "memory": ("MiB of weights and KV cache", lambda r: _bytes(r) / 2**20),
    "speed": ("tokens per second, prompts included", lambda r: r["tokens_per_second"]),
}


def _bytes(result: dict[str, Any]) -> float:
    return float(result["weight_bytes"] + result["kv_peak_bytes"])


def draw(results: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """Draw every result as a point, mean score over memory and over speed; the files written.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "plots need matplotlib: pip install 'headrace[plots]', or go without --output"
        ) from None
    written = []
    for name, (label, value) in AXES.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for result in results:
            x, y = value(result), result["score"]
            axes.plot([x], [y], "o")
            axes.text(x, y, f"  {result['subject']}", va="bottom")
        axes.set_xlabel(label)
        axes.set_ylabel("mean score over the tasks")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        written.append(directory / f"quality-{name}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
    return written
