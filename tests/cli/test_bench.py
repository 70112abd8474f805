"""``headrace bench latency`` and ``throughput``, and the arithmetic of times."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headrace import LLM, SamplingParams
from headrace.cli.bench.engine import median_times, run_steps
from headrace.cli.bench.load import summary
from headrace.cli.timing import describe, timing
from headrace.contracts.outputs import CompletionOutput, RequestMetrics, RequestOutput
from tests.cli.programs import invoke


def bench(*arguments: str) -> Any:
    done = invoke("bench", *arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_latency() -> None:
    options = ("--input-len", "20", "--output-len", "4", "--rounds", "3")
    result = json.loads(bench("latency", *options, "--json"))
    assert result["model"] == "headrace-embedded"
    rounds = result["rounds"]
    assert [(r["prompt_tokens"], r["cached_tokens"], r["output_tokens"]) for r in rounds] == [
        (20, 0, 4)
    ] * 3
    for name, value in result["median"].items():
        assert value == sorted(r[name] for r in rounds)[1] > 0
    table = bench("latency", *options)
    assert "20 tokens in, 4 out" in table
    assert "median" in table


def test_throughput() -> None:
    options = ("--num-prompts", "5", "--input-len", "40", "--output-len", "6")
    result = json.loads(bench("throughput", *options, "--shared-prefix-len", "32", "--json"))
    assert result["requests"] == 5
    assert result["output_tokens_per_second"] == pytest.approx(30 / result["seconds"])
    assert result["total_tokens_per_second"] == pytest.approx(230 / result["seconds"])
    assert result["prefix_hit_tokens"] == 5 * 32
    parts = result["median_step_ms"]
    assert parts["overhead"] < parts["total"]
    assert parts["forward"] > 0
    assert "overhead" in bench("throughput", *options)


def test_more_prompts_than_the_queue_holds() -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    prompts = [[400 + i, 500, 600] for i in range(5)]
    with LLM(dtype="float32", max_num_waiting=2, max_num_seqs=2) as llm:
        outputs, steps = run_steps(llm, prompts, params)
        expected = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert all(output.finished for output in outputs)
    assert len(steps) >= 9


def test_overhead_is_what_the_model_does_not_do() -> None:
    step = {"plan": 1.0, "forward": 5.0, "sample": 2.0, "total": 10.0}
    slow = {**step, "total": 30.0}
    assert median_times([step, slow, step]) == {**step, "overhead": 3.0}


def finished(metrics: RequestMetrics, tokens: int) -> RequestOutput:
    completion = CompletionOutput(0, token_ids=[1] * tokens)
    return RequestOutput("0", None, [1] * 10, [completion], True, metrics=metrics)


def test_timing_of_a_request() -> None:
    metrics = RequestMetrics(1.0, 2.0, 4.0, 8.0, num_cached_tokens=4)
    figures = timing(finished(metrics, 5))
    assert figures == {
        "prompt_tokens": 6,
        "cached_tokens": 4,
        "output_tokens": 5,
        "time_to_first_token": 3.0,
        "time_per_output_token": 1.0,
        "prefill_tokens_per_second": 3.0,
        "decode_tokens_per_second": 1.0,
    }
    assert "prompt 10 tokens (4 cached, 3 tok/s)" in describe(figures)


def test_timing_without_tokens() -> None:
    figures = timing(finished(RequestMetrics(1.0, 2.0, None, 3.0), 0))
    assert figures["output_tokens"] == 0
    assert figures["time_to_first_token"] == figures["decode_tokens_per_second"] == 0.0


def test_percentiles() -> None:
    assert summary([3.0, 1.0, 2.0])["p50"] == 2.0
    assert summary([0.0, 10.0])["p99"] == pytest.approx(9.9)
    assert summary([1.0, 2.0, 6.0]) == {"mean": 3.0, "p50": 2.0, "p99": pytest.approx(5.92)}
