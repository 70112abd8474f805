"""What the benchmarks share: results as tables, fresh processes, where files are kept."""

from __future__ import annotations

import multiprocessing
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from headrace.cli.output import show
from headrace.plan.hardware import probe

CACHE = Path.home() / ".cache" / "headrace-benchmarks"

Value = TypeVar("Value")


@dataclass
class Result:
    """One table, whose rows begin with their names.

    ``details`` are raw figures for the JSON; ``note`` says what a reader of the table may ask.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    details: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def markdown(self) -> str:
        """The table for a page."""
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(map(show, row)) + " |" for row in self.rows]
        return "\n".join([*lines, "", *textwrap.wrap(self.note, 100)] if self.note else lines)


def in_fresh_process(function: Callable[..., Value], *arguments: Any) -> Value:
    """What a function of a module returns, called in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def progress(text: str) -> None:
    """Say on stderr what is under way."""
    print(text, file=sys.stderr, flush=True)


def describe_machine() -> str:
    """The machine in one line."""
    hardware = probe()
    return (
        f"{hardware.processor}, {hardware.cores} cores, {' '.join(hardware.isa)}, "
        f"{hardware.memory_bandwidth / 1e9:.1f} GB/s"
    )
