"""Whole evaluations of the embedded model: what they measure, and how they go on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import LLM
from headrace.contracts.outputs import Logprob
from headrace.errors import ConfigurationError
from headrace.evaluation import evaluation as module
from headrace.evaluation.evaluation import Evaluation, Subject
from headrace.evaluation.held_out import held_out_texts
from headrace.evaluation.language import (
    bits_per_byte,
    divergence,
    divergences,
    score_windows,
    text_windows,
)
from headrace.evaluation.suite import Suite, make_task
from headrace.evaluation.task_run import TaskPlan, choose_problems, run_task, score_problems

SMALL = Suite(
    "small",
    128,
    600,
    (
        TaskPlan(make_task("code-completion"), "line", 6),
        TaskPlan(make_task("needle"), "256", 4),
        TaskPlan(make_task("needle"), "256", 4, agnostic=True),
        TaskPlan(make_task("arithmetic"), "2", 4),
    ),
)
OPTIONS: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20}
PLAIN = Subject("embedded", OPTIONS)
EVICTING = Subject("evicting", {**OPTIONS, "kv": "random-eviction:keep=0.25"})


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return Evaluation(SMALL, EVICTING, PLAIN).run()


def test_every_measure_has_a_row(result: dict[str, Any]) -> None:
    measures = [row["measure"] for row in result["rows"]]
    assert measures == [
        "loss, nats a token",
        "bits per byte",
        "KL to the reference, nats",
        "code-completion line",
        "needle 256",
        "needle 256, question later",
        "arithmetic 2",
    ]
    for row in result["rows"]:
        if "low" in row:
            assert row["low"] <= row["mean"] <= row["high"]
    assert result["rows"][2]["mean"] > 0.001, "eviction changes nothing"
    assert result["kv_peak_bytes"] > 0 and result["tokens_per_second"] > 0


def test_the_unmodified_model_does_not_differ_from_itself() -> None:
    text = Suite("text", 128, 300, ())
    found = Evaluation(text, PLAIN, PLAIN).run()["rows"][2]
    assert found["mean"] < 1e-6


def test_an_interrupted_evaluation_goes_on(
    tmp_path: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record.jsonl"
    seen: list[str] = []

    def stop_at_the_last(done: int, total: int, name: str) -> None:
        seen.append(name)
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Evaluation(SMALL, EVICTING, PLAIN, record, notify=stop_at_the_last).run()
    with record.open("a") as file:
        file.write('{"identity": "cut of')
    called: list[str] = []
    original = module.run_task
    monkeypatch.setattr(
        module,
        "run_task",
        lambda llm, plan, seed: called.append(plan.name) or original(llm, plan, seed),
    )
    again = Evaluation(SMALL, EVICTING, PLAIN, record).run()
    assert called == ["arithmetic 2"]
    assert again["rows"] == result["rows"]
    assert Evaluation(SMALL, EVICTING, PLAIN, record).run()["rows"] == result["rows"]
    assert called == ["arithmetic 2"]


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    record.write_text(json.dumps({"identity": "other", "part": "text", "result": {}}) + "\n")
    with pytest.raises(ConfigurationError, match="is of another evaluation"):
        Evaluation(SMALL, PLAIN, None, record)


def test_a_model_that_changed_is_another_one(tmp_path: Path) -> None:
    model, record = tmp_path / "model", tmp_path / "record.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    subject = Subject("changing", {"model": str(model)})
    Evaluation(SMALL, subject, None, record)._keep("text", {})
    Evaluation(SMALL, subject, None, record)
    (model / "config.json").write_text('{"a": 1}')
    with pytest.raises(ConfigurationError, match="or of a model that has changed since"):
        Evaluation(SMALL, subject, None, record)


def test_text_is_skipped_where_prompts_lose_tokens() -> None:
    pruned = Subject("pruned", {**OPTIONS, "methods": ("slim-infer:span=64,block=16",)})
    found = Evaluation(SMALL, pruned, PLAIN).run()
    [row] = [row for row in found["rows"] if row["measure"] == "loss, nats a token"]
    assert "drops tokens" in row["skipped"] and "mean" not in row
    assert found["kv_peak_bytes"] < Evaluation(SMALL, PLAIN, None).run()["kv_peak_bytes"]


def test_tasks_longer_than_the_context_are_skipped() -> None:
    short = Subject("short", {**OPTIONS, "max_model_len": 200})
    found = Evaluation(SMALL, short, None).run()
    [row] = [row for row in found["rows"] if row["measure"] == "needle 256"]
    assert row["skipped"].startswith("needs 2") and "the context holds 200" in row["skipped"]
    assert "mean" not in row


def test_samples_are_drawn_by_their_seeds(llm: LLM) -> None:
    plan = TaskPlan(make_task("code-completion"), "line", 5, samples=3, temperature=1.0)
    first, again, other = (run_task(llm, plan, 0, seed) for seed in (1, 1, 2))
    assert first.completions == again.completions != other.completions
    assert all(len(texts) == 3 for texts in first.completions)
    problems = choose_problems(plan, 0)
    parts = [score_problems(llm, plan, problems[i : i + 2], 1, i) for i in (0, 2, 4)]
    assert [text for part in parts for text in part.completions] == first.completions


def test_token_counters_are_checked(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TaskPlan(make_task("arithmetic"), "2", 2)
    stats = llm.stats()
    monkeypatch.setattr(type(llm), "stats", lambda self: stats)
    with pytest.raises(RuntimeError, match="the engine counted 0 tokens"):
        run_task(llm, plan, 0)


def test_windows_cover_every_token_once(llm: LLM) -> None:
    texts = list(held_out_texts().values())
    windows = text_windows(llm, 64, 100 * len(texts))
    counted = [token for window in windows for token in window.counted]
    wanted = []
    for text in texts:
        wanted += llm.tokenizer.encode(text)[32:132]
    assert counted == wanted[: len(counted)]
    assert len(wanted) - len(counted) < 64
    assert all(window.first == 32 and 32 < len(window.token_ids) <= 64 for window in windows)


def test_loss_is_what_the_model_says(llm: LLM) -> None:
    windows = text_windows(llm, 128, 200)
    plain = score_windows(llm, windows)
    top = score_windows(llm, windows, 8)
    assert [s.loss for s in plain] == pytest.approx([s.loss for s in top], abs=1e-3)
    assert 0.5 < bits_per_byte(windows, plain) < 3
    assert divergences(top, top) == [0.0] * len(windows)


def entry(*shares: float) -> dict[int, Logprob]:
    return {i: Logprob(math.log(share), 1, None) for i, share in enumerate(shares) if share > 0}


def test_divergence_of_listed_tokens() -> None:
    p, q = entry(0.5, 0.25, 0.25), entry(0.25, 0.5, 0.25)
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert divergence(p, p) == 0


@given(st.lists(st.integers(1, 50), min_size=3, max_size=8), st.randoms(use_true_random=False))
def test_divergence_of_a_part_is_a_lower_bound(weights: list[int], source: Any) -> None:
    p = [w / sum(weights) for w in weights]
    source.shuffle(weights)
    q = [w / sum(weights) for w in weights]
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    part = divergence(entry(*p[:-1]), entry(*q[:-1]))
    assert -1e-9 <= part <= whole + 1e-6
