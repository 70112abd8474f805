"""What is measured, the same in every program, and how a driver reports it.

A driver runs in the environment of its program, so this file needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Workload:
    """``rows`` requests at once of ``prompt`` tokens in and ``output`` tokens out.

    Args:
        figure: what is reported: "decode", "prefill" or "output" tokens per second, or "start",
            the seconds from the program's start to its first token.
        repeats: measurements in one process, whose median counts.
    """

    title: str
    figure: str
    rows: int
    prompt: int
    output: int
    repeats: int = 1


WORKLOADS = {
    "decode": Workload("decode, batch 1, tok/s", "decode", 1, 128, 65),
    "prefill-512": Workload("prefill of 512, tok/s", "prefill", 1, 512, 1, repeats=3),
    "prefill-4096": Workload("prefill of 4,096, tok/s", "prefill", 1, 4096, 1),
    "batch": Workload("16 x (128 in, 64 out), output tok/s", "output", 16, 128, 64),
    "decode-8192": Workload("decode after 8,192 tokens, tok/s", "decode", 1, 8192, 33),
    "start": Workload("cold process to first token, s", "start", 1, 16, 1),
}
FIRST_ID, LAST_ID = 300, 4000
"""Ids between these are plain tokens in every vocabulary used here."""


class Times(NamedTuple):
    """Seconds from handing the requests in to the first token, and to the last."""

    first: float
    last: float


Generate = Callable[[list[list[int]], int], Times]
"""Completes prompts greedily with exactly that many tokens each."""


@dataclass
class Job:
    """What a driver is asked for, as JSON in its first argument.

    Args:
        workloads: measured one after the other in this process.
        seed: no two processes of a run share one, so that no cache knows the tokens.
        started: when the process was started, by ``time.time()``.
        settings: the driver's own.
    """

    workloads: list[str]
    model: str
    threads: int
    seed: int
    started: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> list[Workload]:
        """The workloads' sizes."""
        return [WORKLOADS[name] for name in self.workloads]

    @property
    def rows(self) -> int:
        """Requests at once."""
        return max(shape.rows for shape in self.shapes)

    @property
    def context(self) -> int:
        """Tokens that one sequence may grow to, with a little room."""
        return max(shape.prompt + shape.output for shape in self.shapes) + 64


@dataclass
class Loaded:
    """A program that is ready.

    Args:
        settings: how it runs, to be printed.
        facts: further figures for the report.
        peak_memory_elsewhere: most bytes that one of the program's other processes has had.
    """

    generate: Generate
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    peak_memory_elsewhere: Callable[[], int] = lambda: 0


def random_tokens(rows: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of random ids, the same for one seed in every program."""
    rng = random.Random(seed)
    return [rng.choices(range(FIRST_ID, LAST_ID), k=length) for _ in range(rows)]


def read_job() -> Job:
    """The job of this process."""
    return Job(**json.loads(sys.argv[1]))


def drive(load: Callable[[Job], Loaded]) -> None:
    """Measure this process's job and print one line of JSON."""
    job = read_job()
    # Libraries print where they like; the real stdout is kept for the one line.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        loaded = load(job)
        report = {}
        for name, shape in zip(job.workloads, job.shapes, strict=True):
            value = _measure(job, shape, loaded.generate)
            memory = max(peak_memory(), loaded.peak_memory_elsewhere())
            facts = {"settings": loaded.settings, **loaded.facts}
            report[name] = {"value": value, "peak_rss": memory, **facts}
        print(json.dumps(report), file=answer)


def _measure(job: Job, shape: Workload, generate: Generate) -> float:
    """The figure of a workload."""

    def run(rows: int, prompt: int, output: int, key: int) -> Times:
        return generate(random_tokens(rows, prompt, job.seed * 1000 + key), output)

    if shape.figure == "start":
        run(shape.rows, shape.prompt, shape.output, key=0)
        return time.time() - job.started
    run(shape.rows, min(shape.prompt, 512 // shape.rows), min(shape.output, 4), key=0)
    times = [run(shape.rows, shape.prompt, shape.output, key=1 + i) for i in range(shape.repeats)]
    if shape.figure == "prefill":
        return median(shape.prompt / time.first for time in times)
    if shape.figure == "decode":
        return median((shape.output - 1) / (time.last - time.first) for time in times)
    return median(shape.rows * shape.output / time.last for time in times)


def peak_memory(process: int | str = "self") -> int:
    """Most bytes that a process has had resident.

    Not ``getrusage``, whose figure begins with that of the process which started this one.
    """
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
