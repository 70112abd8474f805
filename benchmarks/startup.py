"""From starting the program to the embedded model's first token, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from harness import Result


def first_output() -> float:
    """Seconds until ``headrace run`` prints the first byte of its completion."""
    command = [sys.executable, "-m", "headrace", "run", "def fibonacci(n):", "--max-tokens", "8"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise RuntimeError("the program printed nothing")
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def measure(rounds: int, quick: bool) -> Result:
    """Start the program ``rounds`` times."""
    times = [first_output() for _ in range(rounds)]
    return Result(
        f"embedded model, {rounds} fresh processes: seconds to the first token",
        ["", "s"],
        [["first start", times[0]], ["median", median(times)], ["slowest", max(times)]],
        {"seconds": times},
    )
