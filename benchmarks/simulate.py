"""10,000 requests through the engine on a virtual clock: how long that takes here.

Scheduler, page accounting and prefix tree are the ones that serve; only the forward pass is
replaced by a predicted duration.
"""

from __future__ import annotations

import time
from statistics import median

from harness import Result, progress

from headrace.config import EngineConfig
from headrace.plan.simulation import SimulationReport, poisson_workload, simulate, simulated_engine

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


def measure(rounds: int, quick: bool) -> Result:
    """Simulate ``rounds`` workloads."""
    requests = 600 if quick else 10_000
    times = []
    for seed in range(rounds):
        progress(f"round {seed + 1} of {rounds}")
        report, seconds = run(requests, seed)
        times.append(seconds)
    waits = [(each.first_token_time or 0.0) - each.arrival_time for each in report.metrics]
    return Result(
        f"{requests:,} simulated requests (mean {INPUT} in, {OUTPUT} out, Poisson, shared "
        f"prefixes): median of {rounds} rounds",
        ["", "value"],
        [
            ["real time, s", median(times)],
            ["slowest round, s", max(times)],
            ["simulated time, s", report.duration],
            ["steps", report.steps],
            ["preemptions", report.preemptions],
            ["prefix hits, % of prompt tokens", 100 * report.prefix_hit_rate],
            ["simulated time to first token, median, s", median(waits)],
        ],
        {"seconds": times},
    )
