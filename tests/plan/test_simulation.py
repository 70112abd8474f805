"""The engine on a virtual clock: workloads, durations, reports."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from statistics import fmean

import pytest

from headrace.config import EngineConfig
from headrace.contracts.profile import EXACT
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.step import PlanRow, StepPlan
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.plan.simulation import (
    LinearCost,
    SimulatedRequest,
    SimulationReport,
    poisson_workload,
    simulate,
    simulated_engine,
)

WORKLOAD = {
    "requests": 400,
    "rate": 4.0,
    "mean_input": 120,
    "mean_output": 30,
    "shared_prefixes": 3,
    "prefix_length": 64,
    "vocab_size": 1000,
    "seed": 5,
}


def run(
    workload: list[SimulatedRequest] | None = None,
    *,
    num_pages: int = 400,
    cost: LinearCost | None = None,
    **options: object,
) -> SimulationReport:
    config = replace(EngineConfig(seed=1, max_num_seqs=32), **options)  # type: ignore[arg-type]
    engine, clock = simulated_engine(
        config, num_pages=num_pages, context=4096, vocab_size=1000, cost=cost
    )
    requests = poisson_workload(**WORKLOAD) if workload is None else workload  # type: ignore[arg-type]
    report = simulate(engine, clock, requests)
    engine.check_integrity()
    assert engine.stats().pages_used == 0
    return report


def test_workload_has_the_statistics_that_were_asked_for() -> None:
    workload = poisson_workload(**{**WORKLOAD, "requests": 4000})  # type: ignore[arg-type]
    arrivals = [request.arrival for request in workload]
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    assert arrivals == sorted(arrivals)
    assert fmean(gaps) == pytest.approx(1 / 4.0, rel=0.1)
    assert fmean(len(r.prompt_token_ids) for r in workload) == pytest.approx(120, rel=0.1)
    assert fmean(r.max_tokens for r in workload) == pytest.approx(30, rel=0.1)
    assert min(r.max_tokens for r in workload) >= 1
    assert all(0 <= t < 1000 for r in workload for t in r.prompt_token_ids)
    begins = [tuple(r.prompt_token_ids[:64]) for r in workload if len(r.prompt_token_ids) > 64]
    shared = {b for b in begins if begins.count(b) > 5}
    assert len(shared) == 3
    assert sum(b in shared for b in begins) == pytest.approx(2000, rel=0.1)


def test_workload_depends_on_its_seed_alone() -> None:
    assert poisson_workload(**WORKLOAD) == poisson_workload(**WORKLOAD)  # type: ignore[arg-type]
    other = poisson_workload(**{**WORKLOAD, "seed": 6})  # type: ignore[arg-type]
    assert other != poisson_workload(**WORKLOAD)  # type: ignore[arg-type]


def test_every_request_gets_its_tokens() -> None:
    report = run()
    workload = poisson_workload(**WORKLOAD)  # type: ignore[arg-type]
    assert sorted(report.output_tokens) == sorted(r.max_tokens for r in workload)
    assert len(report.metrics) == 400 and report.refused == 0
    noticed = sorted(metrics.arrival_time for metrics in report.metrics)
    assert all(at >= r.arrival for at, r in zip(noticed, workload, strict=True))
    assert report.duration >= workload[-1].arrival
    assert report.prefix_hit_rate > 0.1


def test_a_simulation_is_reproducible() -> None:
    assert run() == run()


def test_scarce_memory_costs_preemptions_and_time_but_no_token() -> None:
    ample, scarce = run(num_pages=4000), run(num_pages=130, max_model_len=2048)
    assert ample.preemptions == 0 < scarce.preemptions
    assert scarce.duration > ample.duration
    assert sorted(scarce.output_tokens) == sorted(ample.output_tokens)


def test_prefix_caching_saves_time() -> None:
    heavy = LinearCost(per_input=0.01)
    with_cache, without = run(cost=heavy), run(cost=heavy, enable_prefix_caching=False)
    assert without.prefix_hit_rate == 0.0
    assert fmean(m.finished_time - m.arrival_time for m in with_cache.metrics) < fmean(
        m.finished_time - m.arrival_time for m in without.metrics
    )


def test_a_full_queue_refuses_requests() -> None:
    burst = [SimulatedRequest(0.0, [1, 2, 3], 5) for _ in range(10)]
    report = run(burst, max_num_waiting=4)
    assert (report.refused, len(report.metrics)) == (6, 4)


def test_urgent_requests_are_served_first_under_the_priority_policy() -> None:
    burst = [SimulatedRequest(0.0, [i, 2, 3], 20, priority=1) for i in range(8)]
    burst.append(SimulatedRequest(0.0, [9, 9, 9], 7, priority=0))
    fcfs = run(burst, max_num_seqs=1)
    priority = run(burst, max_num_seqs=1, scheduling_policy="priority")
    assert fcfs.output_tokens == [20] * 8 + [7]
    assert priority.output_tokens == [7] + [20] * 8


def test_steps_take_the_time_that_the_cost_model_says() -> None:
    cost = LinearCost(step=1.0, weights=10.0, per_input=2.0, per_slot=0.5)
    report = run([SimulatedRequest(0.0, [1] * 8, 3)], cost=cost)
    # The prompt computes 8 inputs, which takes longer than the weights; then 9 and 10 slots.
    steps = [1.0 + 16.0 + 4.0, 1.0 + 10.0 + 4.5, 1.0 + 10.0 + 5.0]
    (metrics,) = report.metrics
    assert metrics.first_token_time == steps[0]
    assert metrics.finished_time == report.duration == sum(steps)
    assert report.steps == 3


def test_idle_time_passes_until_the_next_arrival() -> None:
    cost = LinearCost(step=0.0, weights=1.0, per_input=0.0, per_slot=0.0)
    requests = [SimulatedRequest(10.0, [1], 1), SimulatedRequest(20.0, [1], 1)]
    report = run(requests, cost=cost)
    assert [m.finished_time for m in report.metrics] == [11.0, 21.0]


def test_cost_of_a_plan_counts_inputs_and_context() -> None:
    def row(slot: int, count: int) -> PlanRow:
        return PlanRow(0, 0, [0] * count, range(slot, slot + count), slot)

    cost = LinearCost(step=0.0, weights=1.0, per_input=1.0, per_slot=100.0)
    assert cost.seconds(StepPlan([row(5, 1)])) == 1.0 + 600.0
    assert cost.seconds(StepPlan([row(5, 1), row(0, 4)])) == 5.0 + 1000.0


def test_prompts_are_scored_in_simulations_too() -> None:
    engine, _ = simulated_engine(EngineConfig(), num_pages=8, context=64)
    engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=1, prompt_logprobs=0))
    (update,) = engine.step()
    assert update.prompt_logprobs is not None and len(update.prompt_logprobs) == 3


def test_chosen_tokens_and_ends() -> None:
    tokens = iter([4, 5, 0])
    engine, _ = simulated_engine(
        EngineConfig(),
        num_pages=8,
        context=64,
        draw_token=lambda: next(tokens),
        eos_token_ids=(0,),
    )
    engine.add_request("r", [1], SamplingParams(max_tokens=9), profile=EXACT)
    updates = [update for _ in range(3) for update in engine.step()]
    assert [u.token_ids for u in updates] == [[4], [5], [0]]
    assert updates[-1].finish_reason == "stop"


def test_configurations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="kv_cache_memory_bytes: 0 pages"):
        simulated_engine(EngineConfig(), num_pages=0, context=64)
    with pytest.raises(ConfigurationError, match="max_model_len: 65 exceeds the model's context"):
        simulated_engine(EngineConfig(max_model_len=65), num_pages=99, context=64)
    with pytest.raises(ConfigurationError, match="max_model_len: 64 tokens need more KV memory"):
        simulated_engine(EngineConfig(max_model_len=64), num_pages=3, context=64)
    engine, _ = simulated_engine(EngineConfig(), num_pages=3, context=64)
    assert engine.limits.max_model_len == 48, "the context is cut to the memory"


def test_a_request_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        run([SimulatedRequest(0.0, [1], 5000)])


def test_simulations_need_no_torch() -> None:
    program = """
import sys
from headrace.config import EngineConfig
from headrace.plan.simulation import poisson_workload, simulate, simulated_engine
workload = poisson_workload(requests=5, rate=1.0, mean_input=9, mean_output=3,
                            shared_prefixes=1, prefix_length=4, vocab_size=50, seed=0)
engine, clock = simulated_engine(EngineConfig(), num_pages=50, context=512, vocab_size=50)
report = simulate(engine, clock, workload)
assert len(report.metrics) == 5
assert not {"torch", "tokenizers", "safetensors"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
