"""Headrace against the other engines for processors, each at its best documented settings.

    python benchmarks/against_peers.py --programs "headrace w4a8" "llama.cpp q4_K_M" --rounds 5

Every process is a fresh one in the program's own environment, which is made on the first run (that
takes a while and a few GB), one resident at a time, the programs in turn. All get the same token
ids, new ones in every process. The machine's limits are measured before each round.

Samples are kept under the benchmarks' cache as soon as they are there, and a run goes on where the
last one stopped; ``--fresh`` forgets them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import CACHE, Result, in_fresh_process, progress
from peers.environments import drivers, ensure_environment, variables_of
from peers.limits import Limits, measure_limits
from peers.models import ensure_form
from peers.programs import BACKENDS, COMPARISONS, ON_REQUEST, PROGRAMS, SITTINGS, Program
from peers.record import Record, Sample
from peers.tables import COLUMNS, failure_rows, settings_rows, tabulate, title_of
from peers.workloads import Job

from headrace.cli.output import report
from headrace.ops.host import usable_cores

TIME_LIMIT = 1800.0
"""Seconds that one process may take."""
STAT = Path("/proc/stat")
BUSY = 0.1
"""Of the processor's time, from which on a measurement is doubtful."""
REGULAR = tuple(name for name in PROGRAMS if name not in ON_REQUEST)
QUICK = (("headrace bf16", "transformers bf16"), ("decode", "prefill-512", "batch"))
OTHER_SHAPE = ("qwen2.5-0.5b", ("decode", "prefill-512", "batch"))
"""On which Headrace alone is measured, to see that shares of the limits do not hang on a shape."""


class ProgramError(Exception):
    """A program did not give a figure."""


def run_program(
    program: Program, workloads: list[str], shape: str, threads: int, seed: int
) -> dict[str, Sample]:
    """What one fresh process reports of each workload. Raises ProgramError."""
    python = ensure_environment(program.driver)
    job = Job(
        workloads=workloads,
        model=str(ensure_form(shape, program.form)),
        threads=threads,
        seed=seed,
        started=time.time(),
        settings=program.settings,
    )
    command = [str(python), "-m", f"peers.run_{program.driver}", json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=drivers(),
            env=variables_of(program.driver),
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise ProgramError(f"took more than {TIME_LIMIT:.0f} s") from None
        if process.returncode == 0 and output.strip():
            samples: dict[str, Sample] = json.loads(output.splitlines()[-1])
            return samples
        errors.seek(0)
        text = errors.read().replace(str(Path.home()), "~")
        lines = text.strip().splitlines()[-3:]
        raise ProgramError(f"exit status {process.returncode}: {' | '.join(lines)}")


def busy_share(seconds: float = 0.5) -> float:
    """How busy other processes keep the processor; programs that spin suffer most from it."""

    def read() -> tuple[int, int]:
        fields = [int(field) for field in STAT.read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = read()
    time.sleep(seconds)
    new_total, new_idle = read()
    return 1 - (new_idle - idle) / max(1, new_total - total)


def choose_backend(isa: str, shape: str, threads: int) -> str:
    """The best of llama.cpp's back ends that runs here; one of them crashes on some machines."""
    for backend in BACKENDS[isa]:
        probe = Program("llama_cpp", "gguf-q4_0", {"backend": backend})
        try:
            run_program(probe, ["start"], shape, threads, seed=0)
        except ProgramError as error:
            progress(f"llama.cpp does not run with {backend}: {error}")
        else:
            return backend
    raise ProgramError(f"no back end of llama.cpp for {isa} runs here")


def prepare(
    names: list[str], shape: str, threads: int
) -> tuple[dict[str, Program], dict[str, str]]:
    """The programs with their environments and model files made, and why others have none."""
    ready: dict[str, Program] = {}
    missing: dict[str, str] = {}
    backends: dict[str, str] = {}
    for name in names:
        program = PROGRAMS[name]
        try:
            ensure_environment(program.driver)
            ensure_form(shape, program.form)
            if program.driver == "llama_cpp":
                if program.isa not in backends:
                    backends[program.isa] = choose_backend(program.isa, shape, threads)
                program = program.with_settings(backend=backends[program.isa])
        except ProgramError as error:
            missing[name] = str(error)
        except subprocess.CalledProcessError as error:
            progress(f"{name}: {error}")
            missing[name] = f"could not be made ready: exit status {error.returncode}"
        else:
            ready[name] = program
    return ready, missing


class Comparer:
    """Runs programs in turn and keeps what they report."""

    def __init__(
        self, programs: dict[str, Program], record: Record, shape: str, threads: int
    ) -> None:
        self._programs = programs
        self._record = record
        self._shape = shape
        self._threads = threads
        self._failed: set[tuple[str, str]] = set()

    def run(self, sitting: list[str], rounds: int) -> None:
        """Measure what is missing of these comparisons, ``rounds`` times."""
        members = [
            name
            for name in self._programs
            if any(name in COMPARISONS[comparison][1] for comparison in sitting)
        ]
        for number in range(rounds):
            # Every program comes first once in a while: what ran before may leave the machine warm.
            turn = number % max(1, len(members))
            for name in members[turn:] + members[:turn]:
                missing = [part for part in sitting if self._is_missing(part, name, number)]
                if missing:
                    self._measure_limits(missing, number)
                    progress(f"{', '.join(missing)}, round {number + 1} of {rounds}: {name}")
                    self._measure(missing, name, number)

    def _is_missing(self, comparison: str, name: str, number: int) -> bool:
        wanted = name in COMPARISONS[comparison][1] and (comparison, name) not in self._failed
        return wanted and not self._record.has(comparison, name, number)

    def _measure_limits(self, comparisons: list[str], number: int) -> None:
        new = [part for part in comparisons if not self._record.has_limits(part, number)]
        if new:
            limits = in_fresh_process(measure_limits, self._threads)
            for comparison in new:
                self._record.add_limits(comparison, number, limits)

    def _measure(self, comparisons: list[str], name: str, number: int) -> None:
        busy = busy_share()
        if busy > BUSY:
            progress(f"other processes take {busy:.0%} of the processor: expect no good figure")
        workloads = {COMPARISONS[comparison][0]: comparison for comparison in comparisons}
        try:
            samples = run_program(
                self._programs[name], list(workloads), self._shape, self._threads, number
            )
        except ProgramError as error:
            progress(f"{name}: {error}")
            for comparison in comparisons:
                self._record.add_failure(comparison, name, number, str(error))
                self._failed.add((comparison, name))
        else:
            for workload, sample in samples.items():
                sample["busy_before"] = busy
                self._record.add_sample(workloads[workload], name, number, sample)


def run(
    names: Collection[str],
    members: Collection[str],
    shape: str,
    rounds: int,
    path: Path | None,
) -> dict[str, Any]:
    """Make what is missing, measure, and put the tables together.

    Args:
        names: of comparisons.
        members: programs that may take part.
        path: of the record to go on from.
    """
    threads = min(2, usable_cores())
    wanted = [
        name
        for name in PROGRAMS
        if name in members and any(name in COMPARISONS[title][1] for title in names)
    ]
    record = Record(path)
    programs, missing = prepare(wanted, shape, threads)
    comparer = Comparer(programs, record, shape, threads)
    for sitting in SITTINGS:
        comparer.run([name for name in sitting if name in names], rounds)
    chosen = [name for name in COMPARISONS if name in names and record.samples(name)]
    measured = [limits for name in chosen for limits in record.limits(name)]
    return {
        "shape": shape,
        "threads": threads,
        "rounds": rounds,
        "limits": asdict(Limits.median(measured)),
        "tables": {name: tabulate(name, record, shape) for name in chosen},
        "settings": settings_rows(chosen, record),
        "failures": [["", *pair] for pair in missing.items()] + failure_rows(chosen, record),
        "samples": {name: record.samples(name) for name in chosen},
    }


def record_path(shape: str) -> Path:
    """Where the samples of a shape are kept."""
    return CACHE / f"against-peers-{shape}.jsonl"


def measure(rounds: int, quick: bool) -> Result:
    """Every comparison in one table; the settings and the single figures are its details."""
    if quick:
        members, names = QUICK
        result = run(names, members, "tiny", rounds, None)
        return Result(describe(result), COLUMNS, named_rows(result), result)
    shape = "llama-3.2-1b"
    result = run(COMPARISONS, REGULAR, shape, rounds, record_path(shape))
    shape, names = OTHER_SHAPE
    ours = [name for name in REGULAR if PROGRAMS[name].driver == "headrace"]
    other = run(names, ours, shape, rounds, record_path(shape))
    rows = named_rows(result) + [[f"{shape}, {row[0]}", *row[1:]] for row in named_rows(other)]
    return Result(describe(result), COLUMNS, rows, {**result, "other": other})


def named_rows(result: dict[str, Any]) -> list[list[Any]]:
    """The rows of all tables, each beginning with its table's name."""
    return [
        [f"{title_of(name)}: {row[0]}", *row[1:]]
        for name, table in result["tables"].items()
        for row in table
    ]


def describe(result: dict[str, Any]) -> str:
    """The shape, the threads and the limits in a line."""
    limits = result["limits"]
    return (
        f"{result['shape']} shape, {result['threads']} threads, "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s, {limits['bf16_operations'] / 1e12:.2f} TFLOP/s "
        f"bf16, {limits['int8_operations'] / 1e12:.2f} TOP/s int8: "
        f"medians of {result['rounds']} rounds"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(REGULAR))
    parser.add_argument("--workloads", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--shape", default="llama-3.2-1b", help="of make_checkpoint.py")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    arguments = parser.parse_args()
    path = record_path(arguments.shape)
    if arguments.fresh:
        path.unlink(missing_ok=True)
    result = run(arguments.workloads, arguments.programs, arguments.shape, arguments.rounds, path)
    tables = [(title_of(name), COLUMNS, rows) for name, rows in result["tables"].items()]
    tables.append(("settings", ["program", "how it ran"], result["settings"]))
    if result["failures"]:
        tables.append(("no figure", ["", "program", "why"], result["failures"]))
    progress(describe(result))
    report(result, *tables, as_json=arguments.json)


if __name__ == "__main__":
    main()
