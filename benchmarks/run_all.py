"""Run every benchmark and write their tables to docs/performance.md.

    python benchmarks/run_all.py

Results are kept as JSON, so that ``--only`` can renew one table and leave the others.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from harness import CACHE, Result, in_fresh_process, progress

from headrace.plan.hardware import HardwareProfile, probe

BENCHMARKS = {
    "against_transformers": "Against transformers",
    "engine_overhead": "The engine's own time",
    "prefix_caching": "Prefix caching",
    "startup": "Start",
    "simulate": "Simulation",
}
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = CACHE / "results.json"

HEAD = """\
# Performance

<!-- Written by benchmarks/run_all.py; measure again rather than edit. -->

Measured by the scripts in `benchmarks/`. Every figure is a median; where programs are compared,
each runs in a fresh process, one at a time, in turn. Only ratios within one table hold: the speed
of a machine drifts.
"""


def measure(name: str) -> dict[str, Any]:
    """Run one benchmark, and note where and when."""
    progress(f"running {name}")
    result: dict[str, Any] = in_fresh_process(f"{name}.py", "--json")
    return {"result": result, "machine": describe(probe()), "day": date.today().isoformat()}


def describe(hardware: HardwareProfile) -> str:
    """The machine in one line."""
    return (
        f"{hardware.processor}, {hardware.cores} cores, {' '.join(hardware.isa)}, "
        f"{hardware.memory_bandwidth / 1e9:.1f} GB/s"
    )


def render(results: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    parts = [HEAD]
    for name, heading in BENCHMARKS.items():
        if name in results:
            entry = results[name]
            table = Result(**entry["result"])
            title = f"{table.title[0].upper()}{table.title[1:]}"
            parts.append(
                f"## {heading}\n\n```bash\npython benchmarks/{name}.py\n```\n\n"
                f"{title}. {entry['machine']}; {entry['day']}.\n\n"
                f"{table.markdown()}\n"
            )
    return "\n".join(parts)


def main() -> None:
    """Measure and write."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--only", choices=sorted(BENCHMARKS), action="append")
    arguments = made.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or BENCHMARKS:
        results[name] = measure(name)
        RESULTS.write_text(json.dumps(results, indent=2))
    PAGE.write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
