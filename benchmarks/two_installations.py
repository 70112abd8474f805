"""Whether steps of the plain engine take longer than those of another installation of Headrace.

    python benchmarks/two_installations.py /path/to/other/bin/python

Both decode the same 16 rows of the embedded model, no method on, in processes that take turns. Two
processes of the same program differ by where their memory lies, so they are started anew several
times: the interval is that of the mean over starts, of which the medians of their pairs count.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from harness import progress

from headrace.cli.output import report
from headrace.evaluation.statistics import mean_estimate

WORKER = Path(__file__).with_name("installation_worker.py")


class Installation:
    """A process of one installation, which waits for its turns.

    Args:
        python: its interpreter.
    """

    def __init__(self, python: str, threads: int) -> None:
        command = [python, str(WORKER), str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.take_turn()

    def take_turn(self) -> float:
        """Seconds of one."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """Let the process end."""
        self._process.communicate()


def ratios_of_a_start(
    pythons: Sequence[str], threads: int, pairs: int, first: int
) -> tuple[float, list[float]]:
    """The median of seconds here by seconds there, and all of them."""
    installations = [Installation(python, threads) for python in pythons]
    ratios = []
    for number in range(first, first + pairs):
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {each: installations[each].take_turn() for each in order}
        ratios.append(seconds[0] / seconds[1])
    for each in installations:
        each.end()
    return median(ratios), ratios


def main() -> None:
    """Start both several times, and show the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", help="interpreter of the other installation")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--starts", type=int, default=12, help="(default: 12)")
    parser.add_argument("--pairs", type=int, default=10, help="of each start (default: 10)")
    parser.add_argument("--json", action="store_true", help="print a JSON object, not a table")
    arguments = parser.parse_args()
    pythons = (sys.executable, arguments.other)
    medians, ratios = [], []
    for start in range(arguments.starts):
        middle, found = ratios_of_a_start(pythons, arguments.threads, arguments.pairs, start)
        medians.append(math.log(middle))
        ratios += found
        progress(f"start {start + 1} of {arguments.starts}: {middle:.3f}")
    estimate = mean_estimate(medians)
    mean, low, high = map(math.exp, (estimate.mean, estimate.low, estimate.high))
    row = [len(ratios), arguments.threads, mean, low, high]
    result = {
        "threads": arguments.threads,
        "ratio": mean,
        "low": low,
        "high": high,
        "ratios": ratios,
    }
    title = "seconds of 16 decoding rows, those of the other installation = 1"
    table = (title, ["pairs", "threads", "ratio", "low", "high"], [row])
    report(result, table, as_json=arguments.json)


if __name__ == "__main__":
    main()
