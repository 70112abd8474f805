"""Run the benchmarks and write their tables to docs/performance.md.

    python benchmarks/run_all.py --only startup

Results are kept as JSON, so that ``--only`` can renew one table and leave the others.
"""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from harness import CACHE, Result, describe_machine, in_fresh_process, progress

from headrace.cli.output import report

BENCHMARKS = {
    "against_peers": "Against other engines",
    "against_transformers": "Against transformers",
    "engine_overhead": "The engine's own time",
    "prefix_caching": "Prefix caching",
    "kernels": "Native products",
    "block_kernels": "Native products with stored integers",
    "stored_formats": "Decoding from stored formats",
    "thread_pools": "One thread pool or two",
    "weight_formats": "Weight formats",
    "offload": "Weights on disk",
    "method_cards": "Methods",
    "startup": "Start",
    "simulate": "Simulation",
}
"""Module -> heading on the page."""
NAMED_ONLY = ("against_peers", "stored_formats")
"""They make environments of other programs, or forms of models, first."""
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = CACHE / "results.json"

HEAD = """\
# Performance

<!-- Written by benchmarks/run_all.py; measure again rather than edit. -->

Measured by the programs in `benchmarks/`. Every figure is a median; where programs are compared,
each runs in a fresh process, one at a time, in turn. Only ratios within one table hold: the speed
of a machine drifts.
"""


def measure(name: str, rounds: int, quick: bool) -> Result:
    """Run one benchmark in this process."""
    result: Result = importlib.import_module(name).measure(rounds, quick)
    return result


def render(entries: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    parts = [HEAD]
    for name, heading in BENCHMARKS.items():
        if name in entries:
            entry = entries[name]
            table = Result(**entry["result"])
            title = f"{table.title[0].upper()}{table.title[1:]}"
            parts.append(
                f"## {heading}\n\n```bash\npython benchmarks/run_all.py --only {name}\n```\n\n"
                f"{title}. {entry['machine']}; {entry['day']}.\n\n{table.markdown()}\n"
            )
    return "\n".join(parts)


def main() -> None:
    """Measure, show, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="(repeatable)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON objects, not tables")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, only to see that it works; no page"
    )
    arguments = parser.parse_args()
    entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or (name for name in BENCHMARKS if name not in NAMED_ONLY):
        progress(f"running {name}")
        result = in_fresh_process(measure, name, arguments.rounds, arguments.quick)
        table = (result.title, result.columns, result.rows)
        report(asdict(result), table, as_json=arguments.json)
        if not arguments.quick:
            entries[name] = {
                "result": asdict(result),
                "machine": describe_machine(),
                "day": date.today().isoformat(),
            }
            RESULTS.write_text(json.dumps(entries, indent=2))
            PAGE.write_text(render(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
