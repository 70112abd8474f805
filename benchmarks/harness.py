"""What the benchmarks share: results as tables, fresh processes, random prompts."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headrace.cli.output import print_json, print_table, show

CACHE = Path.home() / ".cache" / "headrace-benchmarks"


@dataclass
class Result:
    """One table, and whatever else is worth keeping.

    Args:
        title: what was measured.
        columns: headings.
        rows: the first cell of each names it.
        details: raw figures, for the JSON only.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    details: dict[str, Any] = field(default_factory=dict)

    def print(self, as_json: bool) -> None:
        """Show it as a table or as one JSON object."""
        if as_json:
            print_json(asdict(self))
        else:
            print_table(self.title, self.columns, self.rows)

    def markdown(self) -> str:
        """The table for a page."""
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(show(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join(lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    return made


def in_fresh_process(script: str, *arguments: str) -> Any:
    """Run a script of this folder in a process of its own; parse the JSON it prints."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts of token ids that every vocabulary has."""
    rng = random.Random(seed)
    return [[rng.randrange(300, 4000) for _ in range(length)] for _ in range(count)]


def progress(text: str) -> None:
    """Say on stderr what is under way."""
    print(text, file=sys.stderr, flush=True)
