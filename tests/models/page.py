"""Write docs/models.md from what the parity tests find: ``python -m tests.models.page``."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from headrace.models.base import known_architectures
from tests.support.checkpoints import ALL_CONFIGS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FILES = (*("test_parity.py", "test_architectures.py", "test_adapters.py", "test_embeddings.py"),)
COLUMNS = {
    "prefill, decode": ("test_prefill_and_decode",),
    "batches, chunks": ("test_ragged_batch_of_chunks_and_decodes",),
    "prefix cache": ("test_prefix_hit", "test_prefix_cache"),
    "preemption": ("test_preemption",),
    "several completions": (
        "test_completions_that_share_a_partly_filled_page",
        "test_completions_that_part",
    ),
    "8-bit weights": ("test_quantized",),
    "bf16": ("test_bfloat16",),
    "int8 cache": ("test_int8_cache",),
    "adapters": ("test_every_architecture",),
    "embeddings": ("test_encoder", "test_every_decoder"),
}
HEAD = """\
# Models

<!-- Written by `python -m tests.models.page`; run it rather than edit. -->

Architectures by the `model_type` of their `config.json`, and the situations in which a small model
with random weights and every feature active gives the logits of transformers, to 1e-4 in fp32
(1e-3 where layers are recurrent). Each cell is the outcome of a test in `tests/models/`; that a
test would notice a feature that is missing is tested too. Where numbers are rounded (8-bit weights,
bf16, an int8 cache), little may change instead.

"""
NOTES = """
Prefixes of recurrent models are not found again: their state is known only where a sequence ends,
and prefix caching is off for them. Windows free the pages behind them.
"""


class Outcomes:
    """A pytest plugin that gathers the outcome of every test."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        name, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        column = next((c for c, tests in COLUMNS.items() if name in tests), None)
        model_type = model_type_of(parameters.rstrip("]"))
        if column is not None and model_type is not None:
            notes = [str(value) for key, value in report.user_properties if key == "outcome"]
            outcome = notes[0] if notes and report.passed else report.outcome
            self.cells[model_type, column].add("yes" if outcome == "passed" else outcome)


def model_type_of(parameters: str) -> str | None:
    """The architecture that a test's parameters name."""
    parts = [parameters, *re.split(r"-(?=fast|reference|whole|chunks|[a-z]+_tokens?)", parameters)]
    for part in [*parts, *parameters.split("-")]:
        if part in ALL_CONFIGS:
            return str(ALL_CONFIGS[part]().model_type)
        if part in ("bert", "roberta", "xlm_roberta"):
            return part
    return None


def render(cells: dict[tuple[str, str], set[str]]) -> str:
    """The page."""
    lines = [f"| architecture | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in known_architectures():
        row = [" ".join(sorted(cells.get((name, column), {""}))) for column in COLUMNS]
        lines.append(f"| `{name}` | {' | '.join(row)} |")
    return HEAD + "\n".join(lines) + "\n" + NOTES


def main() -> int:
    """Run the tests and write the page; the exit status is theirs."""
    outcomes = Outcomes()
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    status = pytest.main(["-q", *files], plugins=[outcomes])
    PAGE.write_text(render(outcomes.cells), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
