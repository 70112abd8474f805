"""Headrace against the other engines for processors, each at its best documented settings.

    python benchmarks/against_peers.py --peers headrace llama_cpp --workloads decode --rounds 5

Every measurement is a fresh process in the program's own environment, which is made on the first
run (that takes a while and a few GB), one resident at a time, the programs of a workload in turn.
All get the same token ids, new ones in every process. The machine's limits are measured between.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from harness import Result, in_fresh_process, progress
from peers.environments import drivers, ensure_environment, variables_of
from peers.limits import Limits, attainable, measure_limits
from peers.models import ensure_form, read_config, weight_bytes
from peers.programs import BACKENDS, COMPARISONS, PROGRAMS, Program
from peers.workloads import WORKLOADS, Job, Workload

from headrace.cli.output import report
from headrace.ops.host import usable_cores

TIME_LIMIT = 1800.0
"""Seconds that one process may take."""
STAT = Path("/proc/stat")
BUSY = 0.1
"""Of the processor's time, from which on a measurement is doubtful."""
QUICK = (("headrace", "transformers"), ("decode", "prefill-512", "batch"))

Sample = dict[str, Any]
"""What a driver reports."""
COLUMNS = [
    "",
    "median",
    "lowest",
    "highest",
    "best headrace / it",
    "same width / it",
    "% of limit",
    "peak RSS, GiB",
]


class ProgramError(Exception):
    """A program did not give a figure."""


@dataclass
class Comparison:
    """What one workload gave.

    Args:
        samples: program -> what its processes reported.
        failures: program -> why it gave nothing.
        limits: measured before each round.
    """

    workload: Workload
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    limits: list[Limits] = field(default_factory=list)


def run_program(program: Program, workload: str, shape: str, threads: int, seed: int) -> Sample:
    """One measurement in a fresh process. Raises ProgramError."""
    python = ensure_environment(program.driver)
    job = Job(
        workload=workload,
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
            sample: Sample = json.loads(output.splitlines()[-1])
            return sample
        errors.seek(0)
        lines = errors.read().strip().splitlines()[-3:]
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
            run_program(probe, "start", shape, threads, seed=0)
        except ProgramError as error:
            progress(f"llama.cpp does not run with {backend}: {error}")
        else:
            return backend
    raise ProgramError(f"no back end of llama.cpp for {isa} runs here")


def prepare(names: list[str], shape: str, threads: int) -> tuple[dict[str, Program], Comparison]:
    """The programs with their environments and model files made, and those that have none."""
    ready: dict[str, Program] = {}
    missing = Comparison(WORKLOADS["start"])
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
            missing.failures[name] = str(error)
        except subprocess.CalledProcessError as error:
            progress(f"{name}: {error}")
            missing.failures[name] = f"could not be made ready: exit status {error.returncode}"
        else:
            ready[name] = program
    return ready, missing


def compare(
    name: str, programs: dict[str, Program], shape: str, threads: int, rounds: int
) -> Comparison:
    """Run the programs of one comparison in turn, ``rounds`` times."""
    workload, members = COMPARISONS[name]
    result = Comparison(WORKLOADS[workload])
    chosen = [member for member in members if member in programs]
    for number in range(rounds):
        result.limits.append(in_fresh_process(measure_limits, threads))
        # Every program comes first once in a while: what ran before may leave the machine warm.
        turn = number % max(1, len(chosen))
        for member in chosen[turn:] + chosen[:turn]:
            if member in result.failures:
                continue
            progress(f"{name}, round {number + 1} of {rounds}: {member}")
            busy = busy_share()
            if busy > BUSY:
                progress(f"other processes take {busy:.0%} of the processor: expect no good figure")
            try:
                sample = run_program(programs[member], workload, shape, threads, number)
            except ProgramError as error:
                progress(f"{member}: {error}")
                result.failures[member] = str(error)
            else:
                result.samples.setdefault(member, []).append({**sample, "busy_before": busy})
    return result


def tabulate(
    comparison: Comparison, programs: dict[str, Program], config: dict[str, Any], shape: str
) -> list[list[Any]]:
    """Rows of ``COLUMNS``, in the order of the programs."""
    workload, samples = comparison.workload, comparison.samples
    limits = Limits.median(comparison.limits)
    medians = {name: median(s["value"] for s in samples[name]) for name in samples}
    smaller_wins = workload.figure == "start"

    def ratio(names: list[str], other: str) -> float | str:
        """How many times better the best of ``names`` is."""
        values = [medians[name] for name in names]
        if not values:
            return ""
        best = min(values) if smaller_wins else max(values)
        better, worse = (medians[other], best) if smaller_wins else (best, medians[other])
        return round(float(better / worse), 2)

    ours = [name for name in medians if programs[name].driver == "headrace"]
    rows = []
    for name in [name for name in programs if name in samples]:
        program, last = programs[name], samples[name][-1]
        form = ensure_form(shape, program.form)
        values = [sample["value"] for sample in samples[name]]
        weights = last.get("weight_bytes") or weight_bytes(form)
        plain_kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"]
        kv = last.get("kv_token_bytes") or plain_kv * config["head_dim"] * program.kv_item_bytes
        limit = attainable(workload, config, limits, program.bits, weights, kv)
        same = [other for other in ours if programs[other].bits == program.bits]
        rows.append(
            [
                name,
                medians[name],
                min(values),
                max(values),
                ratio(ours, name),
                ratio(same, name),
                round(100 * medians[name] / limit, 1) if limit else "",
                round(max(sample["peak_rss"] for sample in samples[name]) / 2**30, 2),
            ]
        )
    return rows


def settings_rows(comparisons: dict[str, Comparison]) -> list[list[str]]:
    """How each program ran; what differs between workloads is that of the last."""
    settings = {
        name: samples[-1]["settings"]
        for comparison in comparisons.values()
        for name, samples in comparison.samples.items()
    }
    return [
        [name, ", ".join(f"{key}={value}" for key, value in values.items())]
        for name, values in settings.items()
    ]


def failure_rows(comparisons: dict[str, Comparison]) -> list[list[str]]:
    """What gave no figure, and why."""
    return [
        [title, name, reason]
        for title, comparison in comparisons.items()
        for name, reason in comparison.failures.items()
    ]


def run(names: list[str], peers: list[str], shape: str, rounds: int) -> dict[str, Any]:
    """Make what is missing, measure, and put the tables together."""
    threads = min(2, usable_cores())
    wanted = [
        name
        for name, program in PROGRAMS.items()
        if program.driver in peers and any(name in COMPARISONS[title][1] for title in names)
    ]
    programs, missing = prepare(wanted, shape, threads)
    comparisons = {name: compare(name, programs, shape, threads, rounds) for name in names}
    config = read_config(shape)
    measured = [limits for part in comparisons.values() for limits in part.limits]
    return {
        "shape": shape,
        "threads": threads,
        "rounds": rounds,
        "limits": asdict(Limits.median(measured)),
        "tables": {
            name: tabulate(comparison, programs, config, shape)
            for name, comparison in comparisons.items()
        },
        "settings": settings_rows(comparisons),
        "failures": failure_rows({"prepare": missing, **comparisons}),
        "samples": {name: comparison.samples for name, comparison in comparisons.items()},
    }


def measure(rounds: int, quick: bool) -> Result:
    """Every comparison in one table; the settings and the single figures are its details."""
    peers, names = (list(part) for part in QUICK) if quick else (list(DRIVERS), list(COMPARISONS))
    result = run(names, peers, "tiny" if quick else "llama-3.2-1b", rounds)
    rows = [
        [f"{title_of(name)}: {row[0]}", *row[1:]]
        for name, table in result["tables"].items()
        for row in table
    ]
    return Result(describe(result), COLUMNS, rows, result)


def title_of(name: str) -> str:
    """A comparison in words."""
    workload, _ = COMPARISONS[name]
    forced = name.removeprefix(workload).lstrip("-")
    return WORKLOADS[workload].title + (f", all forced to {forced}" if forced else "")


def describe(result: dict[str, Any]) -> str:
    """The shape, the threads and the limits in a line."""
    limits = result["limits"]
    return (
        f"{result['shape']} shape, {result['threads']} threads, "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s, {limits['bf16_operations'] / 1e12:.2f} TFLOP/s "
        f"bf16, {limits['int8_operations'] / 1e12:.2f} TOP/s int8: "
        f"medians of {result['rounds']} rounds"
    )


DRIVERS = tuple(dict.fromkeys(program.driver for program in PROGRAMS.values()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=DRIVERS, default=list(DRIVERS))
    parser.add_argument("--workloads", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--shape", default="llama-3.2-1b", help="of make_checkpoint.py")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    arguments = parser.parse_args()
    result = run(arguments.workloads, arguments.peers, arguments.shape, arguments.rounds)
    tables = [(title_of(name), COLUMNS, rows) for name, rows in result["tables"].items()]
    tables.append(("settings", ["program", "how it ran"], result["settings"]))
    if result["failures"]:
        tables.append(("no figure", ["", "program", "why"], result["failures"]))
    progress(describe(result))
    report(result, *tables, as_json=arguments.json)


if __name__ == "__main__":
    main()
