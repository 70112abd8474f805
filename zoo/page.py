"""Evaluate the family and write docs/zoo.md: ``python -m zoo.page``."""

import argparse
import json
from pathlib import Path
from typing import Any

from headrace.cli.evaluate import markdown, run_evaluation
from zoo import acceptance, selection, trust
from zoo.recipe import MODELS

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
NAMES = ("base", "draft", "long", "reason", "verifier")
EVALUATED = ("base", "draft", "long", "reason")

HEAD = """\
# The zoo

<!-- Written by zoo/page.py; train and measure again rather than edit. -->

Small models, trained here from nothing, on which methods are measured. All share the tokenizer of
the embedded model. Their recipes are in [zoo/](../zoo/README.md), one command each; their files in
`zoo/models/`, the verifier's when its command has made them.

## Training

Data: the Python library of the interpreter that trains, without the held-out modules, and problems
and contexts made by the tasks of [the evaluation](evaluation.md), never one that is tested on.
Minutes are those of a clock, most of them beside other work on the same cores; base and draft were
trained with `--budget 12000000`.

| model | parameters | tokens | minutes | hardware | training loss, nats a token |
|---|---|---|---|---|---|
"""

SCORES = """
## Scores

`headrace eval --check docs/zoo.md` measures them again.
"""


def training_rows() -> list[str]:
    """Return a line for every model."""
    rows = []
    for name in NAMES:
        facts = json.loads((MODELS / name / "training.json").read_text("utf-8"))
        rows.append(
            f"| {name} | {facts['parameters']:,} | {facts['tokens']:,} | {facts['minutes']:.0f} | "
            f"{facts['hardware']} | {facts['loss']:.3f} |"
        )
    return rows


def selection_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of what several attempts are worth."""
    names = ("pass@1", "majority", "verifier")
    columns = ["problems", "pass@1"]
    for name in ("majority of 8", "verifier, best of 8"):
        columns += [name, "more than pass@1"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["measure"]]
        for name in names:
            cells.append(f"{row[name]['mean']:.3f}")
            if name != "pass@1":
                change = row[f"{name} - pass@1"]["estimate"]
                cells.append(
                    f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
                )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m zoo.page", description=__doc__)
    parser.add_argument("--suite", default="full")
    parser.add_argument("--record", type=Path, help="directory from which evaluations go on")
    options = parser.parse_args()
    parts = [HEAD + "\n".join(training_rows()) + "\n", SCORES]
    for name in EVALUATED:
        command = f"zoo/models/{name} --suite {options.suite}"
        model = {"model": str(MODELS / name)}
        result = run_evaluation(model, options.suite, None, 0, None, options.record)
        parts.append(f"\n### {name}\n\n" + markdown(result, command))
    found = acceptance.measure(MODELS / "base", MODELS / "draft")
    parts.append(
        "\n## Draft and base\n\n"
        f"Of the tokens that base writes greedily behind held-out code, {found.rate.mean:.1%} "
        f"({found.rate.low:.1%} to {found.rate.high:.1%}) are also the likeliest of draft: "
        f"{found.run:.2f} in a row. With draft guessing {acceptance.LENGTH} at a time, "
        f"{found.guessed:.1%} of the guesses are accepted, and a pass of base gives "
        f"{found.per_pass:.2f} tokens (`python -m zoo.acceptance`).\n"
    )
    rows = selection.measure(MODELS / "reason", MODELS / "verifier", 200)
    parts.append(
        "\n## Several attempts\n\nOf reason, at temperature 0.8 (`python -m zoo.selection`).\n\n"
        + "\n".join(selection_rows(rows))
        + "\n"
    )
    parts.append(
        "\n## What the evaluation notices\n\n`python -m zoo.trust` compares configurations that "
        "are broken on purpose, and an engine with itself.\n\n"
        + trust.report(trust.broken_cases(), trust.self_comparisons())
    )
    PAGE.write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
