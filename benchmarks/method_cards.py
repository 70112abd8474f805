"""What every method does and costs, on its card: ``headrace methods NAME`` shows it.

    python benchmarks/method_cards.py --only scissorhands

Quality is measured on the trained models of the zoo, time and memory on a model with random weights
in the shape of Llama-3.2-1B; what takes both is replayed and says so. Methods that do the same are
measured beside each other. Each part runs in a fresh process; what it found is kept at once, and a
run that was interrupted goes on with the parts that are missing (``--fresh`` begins anew).
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from cards.measuring import Rows, Setup
from harness import CACHE, Result, describe_machine, in_fresh_process, progress

from headrace.cli.output import report
from headrace.evaluation.measured import (
    PLAIN,
    Measurement,
    merge_measurements,
    read_measurements,
)
from headrace.methods import known_methods

SHIPPED = Path(__file__).parents[1] / "src" / "headrace" / "assets" / "cards"
QUICK = CACHE / "quick-cards"
COMMAND = "python benchmarks/method_cards.py --only {method}"
COLUMNS = ["", "value", "low", "high", "plain"]


@dataclass(frozen=True, slots=True)
class Part:
    """Something that is measured at once.

    Args:
        name: module and function, which takes a ``Setup``.
        methods: that it measures.
    """

    name: str
    methods: tuple[str, ...]


_POLICIES = ("scissorhands", "h2o", "random-eviction")
_CODECS = ("gear", "kivi")
PARTS = (
    Part("cache.pages", _POLICIES),
    Part("cache.sequences", _POLICIES),
    Part("cache.policy_recall", _POLICIES),
    Part("cache.policy_text", _POLICIES),
    Part("cache.policy_speed", _POLICIES[:2]),
    Part("cache.codec_bytes", _CODECS),
    Part("cache.codec_recall", _CODECS),
    Part("cache.codec_text", _CODECS),
    Part("cache.codec_speed", _CODECS),
    Part("drafting.acceptance", ("triforce", "draft-model")),
    Part("drafting.long_context", ("triforce", "draft-model")),
    Part("together.layouts", ("hogwild-inference",)),
    Part("together.speed", ("hogwild-inference",)),
    Part("layers.exits", ("early-exit",)),
    Part("layers.neurons", ("core-infer",)),
    Part("layers.neuron_speed", ("core-infer",)),
    Part("layers.pruning", ("slim-infer",)),
    Part("layers.pruning_speed", ("slim-infer",)),
    Part("steering.intervention", ("inference-time-intervention",)),
    Part("steering.recording", ("activation-recorder",)),
    Part("steering.speed", ("inference-time-intervention", "activation-recorder")),
    Part("disk.offloading", ("flexgen",)),
)


def run_part(name: str, rounds: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Measure a part in this process; rows as JSON, by method."""
    module, _, function = name.rpartition(".")
    rows: Rows = getattr(importlib.import_module(f"cards.{module}"), function)(Setup(rounds, quick))
    return {method: [asdict(row) for row in found] for method, found in rows.items()}


class Progress:
    """Which parts an unfinished run has behind it, in a file.

    Args:
        path: of the file; what another run of other sizes left there is forgotten.
    """

    def __init__(self, path: Path, rounds: int, fresh: bool) -> None:
        self._path, self._rounds = path, rounds
        self.done: list[str] = []
        if path.exists() and not fresh:
            kept = json.loads(path.read_text("utf-8"))
            self.done = kept["done"] if kept["rounds"] == rounds else []

    def add(self, part: str) -> None:
        """A part is done and its rows are where they belong."""
        self.done.append(part)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"rounds": self._rounds, "done": self.done}), "utf-8")

    def finish(self) -> None:
        """The next run begins anew."""
        self._path.unlink(missing_ok=True)


def choose_parts(methods: Sequence[str], named: Sequence[str]) -> list[Part]:
    """Those that measure any of the methods, and are named if any are."""
    return [
        part
        for part in PARTS
        if set(part.methods) & set(methods) and (not named or part.name in named)
    ]


def measure_parts(
    parts: Sequence[Part], rounds: int, quick: bool, directory: Path, fresh: bool
) -> list[str]:
    """Measure what an interrupted run has left, and merge it into the files.

    Returns the parts that failed, with the reasons.
    """
    # What ships has measurements only.
    beside = CACHE if directory == SHIPPED else directory
    record = Progress(beside / "unfinished-cards.json", rounds, fresh)
    missing = [part for part in parts if part.name not in record.done]
    machine, failed = describe_machine(), []
    for number, part in enumerate(missing, len(parts) - len(missing) + 1):
        progress(f"{number} of {len(parts)}: {part.name} ({', '.join(part.methods)})")
        started = time.perf_counter()
        try:
            found = in_fresh_process(run_part, part.name, rounds, quick)
        except Exception as error:
            failed.append(f"{part.name}: {type(error).__name__}: {error}")
            progress(f"  failed: {error}")
            continue
        for method, listed in found.items():
            rows = [
                replace(
                    Measurement(**row),
                    part=part.name,
                    command=COMMAND.format(method=method),
                    machine=machine,
                    day=date.today().isoformat(),
                )
                for row in listed
            ]
            merge_measurements(directory / f"{method}.json", part.name, rows)
        record.add(part.name)
        progress(f"  {time.perf_counter() - started:.0f} s")
    if not failed:
        record.finish()
    return failed


def table(methods: Sequence[str], directory: Path) -> Result:
    """All rows of the methods' files."""
    rows: list[list[Any]] = []
    for method in methods:
        for row in read_measurements(directory / f"{method}.json"):
            replayed = f" ({row.basis})" if row.basis else ""
            name = f"{row.options}, {row.model}: {row.what}{replayed}"
            plain = (row.beside or {}).get(PLAIN)
            values = (row.value, row.low, row.high, plain)
            rows.append([name, *("" if each is None else each for each in values)])
    return Result(
        "what methods do and cost; `headrace methods NAME` shows more of one", COLUMNS, rows
    )


def methods_of_the_house() -> list[str]:
    """Those that there are parts for."""
    known = known_methods()
    return sorted({method for part in PARTS for method in part.methods if method in known})


def measure(rounds: int, quick: bool) -> Result:
    """All methods, into the files that ship with the package; ``quick`` into others."""
    directory = QUICK if quick else SHIPPED
    methods = methods_of_the_house()
    failed = measure_parts(choose_parts(methods, ()), rounds, quick, directory, fresh=quick)
    if failed:
        raise RuntimeError("\n".join(failed))
    return table(methods, directory)


def main() -> None:
    """Measure, merge, and show."""
    names = methods_of_the_house()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=names, action="append", help="method (repeatable)")
    parser.add_argument(
        "--part", choices=[part.name for part in PARTS], action="append", help="(repeatable)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--fresh", action="store_true", help="forget an unfinished run")
    parser.add_argument("--output", type=Path, help="directory of the files")
    parser.add_argument("--json", action="store_true", help="print a JSON object, no table")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, only to see that it works"
    )
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    directory = arguments.output or (QUICK if arguments.quick else SHIPPED)
    methods = arguments.only or names
    parts = choose_parts(methods, arguments.part or ())
    failed = measure_parts(parts, arguments.rounds, arguments.quick, directory, arguments.fresh)
    result = table(methods, directory)
    report(asdict(result), (result.title, result.columns, result.rows), as_json=arguments.json)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
