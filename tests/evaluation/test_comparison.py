"""Two configurations in turn."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.evaluation.comparison import BATCHES, Comparison
from headrace.evaluation.evaluation import Subject
from headrace.evaluation.suite import Suite, make_task
from headrace.evaluation.task_run import TaskPlan

OPTIONS: dict[str, Any] = {"kv_cache_memory_bytes": 24 << 20}
PLAIN = Subject("plain", OPTIONS)
SUITE = Suite(
    "small",
    128,
    4000,
    (
        TaskPlan(make_task("code-completion"), "line", 30),
        TaskPlan(make_task("needle"), "8192", 2),
    ),
)


def test_a_lossy_configuration_differs() -> None:
    evicting = Subject("evicting", {**OPTIONS, "kv": "random-eviction:keep=0.1"})
    result = Comparison(PLAIN, evicting, SUITE).run()
    text, code, needle = result["rows"]
    assert text["significant"] and text["difference"]["low"] > 0
    assert code["items"] == 30
    assert "needs" in needle["skipped"]
    plain, smaller = (memory["kv_peak_bytes"] for memory in result["memory"])
    assert smaller < plain
    for speed in result["speeds"]:
        assert set(speed["tokens"]) == set(BATCHES) and speed["first_token"] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_does_not_differ_from_itself(temperature: float) -> None:
    result = Comparison(PLAIN, PLAIN, SUITE, temperature=temperature).run()
    text, code, _ = result["rows"]
    assert not text["significant"] and abs(text["difference"]["mean"]) < 1e-6
    assert not code["significant"] and code["difference"]["mean"] == 0
