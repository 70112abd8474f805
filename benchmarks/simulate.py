"""10,000 requests through the engine on a virtual clock: how long that takes here.

    python benchmarks/simulate.py

Scheduler, page accounting and prefix tree are the ones that serve; only the forward pass is
replaced by a predicted duration.
"""

from __future__ import annotations

import time
from statistics import median

from harness import Result, parser, progress

from headrace.config import EngineConfig
from headrace.plan.simulation import (
    SimulationReport,
    poisson_workload,
    simulate,
    simulated_engine,
)

INPUT, OUTPUT = 200, 60


def run(requests: int, seed: int) -> tuple[SimulationReport, float]:
    """One simulation on a memory that forces preemption: its report, and seconds of real time."""
    workload = poisson_workload(
        requests=requests,
        rate=2.2,
        mean_input=INPUT,
        mean_output=OUTPUT,
        shared_prefixes=16,
        prefix_length=128,
        vocab_size=32_000,
        seed=seed,
    )
    config = EngineConfig(max_num_seqs=64, max_num_waiting=requests, seed=seed)
    engine, clock = simulated_engine(config, num_pages=600, context=4096)
    start = time.perf_counter()
    report = simulate(engine, clock, workload)
    seconds = time.perf_counter() - start
    engine.check_integrity()
    assert len(report.metrics) == requests
    assert report.preemptions > 0
    return report, seconds


def measure(requests: int, rounds: int) -> Result:
    """Simulate ``rounds`` workloads."""
    reports, times = [], []
    for seed in range(rounds):
        progress(f"round {seed + 1} of {rounds}")
        report, seconds = run(requests, seed)
        reports.append(report)
        times.append(seconds)
    last = reports[-1]
    waits = [
        metrics.first_token_time - metrics.arrival_time
        for metrics in last.metrics
        if metrics.first_token_time is not None
    ]
    return Result(
        f"{requests:,} simulated requests (mean {INPUT} in, {OUTPUT} out, Poisson, shared "
        f"prefixes): median of {rounds} rounds",
        ["", "value"],
        [
            ["real time, s", median(times)],
            ["slowest round, s", max(times)],
            ["simulated time, s", last.duration],
            ["steps", last.steps],
            ["preemptions", last.preemptions],
            ["prefix hits, % of prompt tokens", 100 * last.prefix_hit_rate],
            ["simulated time to first token, median, s", median(waits)],
        ],
        {"seconds": times},
    )


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--requests", type=int, default=10_000, help="(default: 10,000)")
    arguments = made.parse_args()
    measure(arguments.requests, arguments.rounds).print(arguments.json)
