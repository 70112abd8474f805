"""The learning curve of a run as a picture."""

import json
from pathlib import Path

SMOOTHING = 0.98
"""Of the running mean that is drawn over the single steps."""


def draw_learning_curve(log: Path, target: Path) -> None:
    """Draw ``loss.jsonl`` of a run: loss in nats a token over tokens trained, as an SVG."""
    from matplotlib.figure import Figure

    lines = log.read_text(encoding="utf-8").splitlines()
    entries = {entry["step"]: entry for entry in map(json.loads, lines)}
    tokens = [entries[step]["tokens"] / 1e6 for step in sorted(entries)]
    losses = [entries[step]["loss"] for step in sorted(entries)]
    means, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(mean / weight)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, losses, linewidth=0.4, alpha=0.4, color="tab:blue")
    axes.plot(tokens, means, linewidth=1.5, color="tab:blue")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss, nats a token")
    axes.grid(alpha=0.3)
    # No date and no random names, so that the same run gives the same file.
    figure.savefig(target, metadata={"Date": None})
