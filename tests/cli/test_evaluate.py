"""``headrace eval`` and ``headrace compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.cli.evaluate import markdown, parse_subject, reference_of, run_evaluation
from headrace.errors import ConfigurationError
from headrace.evaluation import suite as suites
from headrace.evaluation.suite import Suite, make_task
from headrace.evaluation.task_run import TaskPlan
from tests.cli.programs import invoke

MEMORY = ("--kv-cache-memory", "16MiB")


@pytest.fixture(autouse=True)
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick suite, smaller."""
    plans = tuple(TaskPlan(make_task(name), level, 3) for name, level in SMALL)
    original = suites.make_suite

    def make_suite(name: str) -> Suite:
        return Suite("quick", 128, 400, plans) if name == "quick" else original(name)

    monkeypatch.setattr(suites, "make_suite", make_suite)


SMALL = (("arithmetic", "2"), ("code-completion", "line"), ("needle", "4096"))


def test_a_result_its_plots_and_its_record(tmp_path: Path) -> None:
    arguments = ("eval", *MEMORY, "--kv", "random-eviction:keep=0.5", "-o", str(tmp_path))
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["subject"] == "embedded kv=random-eviction:keep=0.5"
    assert [row["measure"] for row in result["rows"]][2] == "KL to the reference, nats"
    names = {file.name for file in tmp_path.iterdir()}
    label = "embedded_kv=random-eviction_keep=0.5.quick"
    assert names == {
        *(f"{label}.json", f"{label}.record.jsonl"),
        *("quality-memory.svg", "quality-speed.svg"),
    }
    assert json.loads((tmp_path / f"{label}.json").read_text())["rows"] == result["rows"]


def test_a_table_says_what_was_skipped() -> None:
    done = invoke("eval", *MEMORY, "--task", "needle")
    assert done.exit_code == 0, done.stderr
    assert "skipped" in done.stdout and "arithmetic" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "slow"), "suite: 'slow' is unknown; known: quick, full"),
        (("--task", "chess"), "task: 'chess' is unknown; known: arithmetic,"),
        (("no-such-directory",), "no-such-directory"),
        (("--kv", "magic"), "'magic' is unknown; known: "),
        (("--kv", "activation-recorder"), "does not decide what stays in the KV cache"),
        (("--check", "no-such-page.md"), "no-such-page.md does not exist"),
        (("--reference", "--kv"), "kv"),
        (("--reference", "--frobnicate 1"), "frobnicate"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    done = invoke("eval", *arguments)
    assert done.exit_code == 1, done.output
    assert message in done.stderr


def test_the_reference_is_without_what_is_lossy() -> None:
    subject = parse_subject("model --kv random-eviction --weights w8a8 --max-num-seqs 3")
    assert subject.options == {
        "model": "model",
        "kv": "random-eviction",
        "weights": "w8a8",
        "max_num_seqs": 3,
    }
    reference = reference_of(subject.options)
    assert reference is not None
    assert reference.options == {"model": "model", "max_num_seqs": 3}
    assert reference_of(reference.options) is None


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page that states a result."""
    engine: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20}
    result = run_evaluation(engine, "quick", ["arithmetic", "code-completion"], 0, None, None)
    page = tmp_path / "page.md"
    text = markdown(result, "--kv-cache-memory 16MiB --suite quick")
    page.write_text(f"# Page\n\nText.\n\n{text}\nMore text.\n")
    return page


def test_a_true_page_is_confirmed(page: Path) -> None:
    done = invoke("eval", "--check", str(page))
    assert done.exit_code == 0, done.stderr
    assert "loss, nats a token" in done.stderr


def test_a_page_that_is_not_true_is_found(page: Path) -> None:
    wrong = page.read_text().replace("| bits per byte | 1", "| bits per byte | 2")
    assert wrong != page.read_text()
    page.write_text(wrong)
    done = invoke("eval", "--check", str(page))
    assert done.exit_code == 1
    assert "is not true any more" in done.stderr and "bits per byte" in done.stderr


def test_a_page_without_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Nothing\n")
    done = invoke("eval", "--check", str(page))
    assert done.exit_code == 1 and "states no result" in done.stderr


def test_compare(embedded_dir: Path) -> None:
    first = f"{embedded_dir} --kv-cache-memory 16MiB"
    done = invoke("compare", first, f"{first} --weights w8a8", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["subjects"] == ["embedded", "embedded weights=w8a8"]
    assert [row["measure"] for row in result["rows"]][:2] == ["loss, nats a token", "arithmetic 2"]
    one, other = (memory["weight_bytes"] for memory in result["memory"])
    assert other < 0.6 * one
    shown = invoke("compare", first, first, "--task", "arithmetic")
    assert shown.exit_code == 0, shown.stderr
    assert "second / first" in shown.stdout and "KV at most" in shown.stdout


def test_compare_names_what_is_wrong() -> None:
    done = invoke("compare", "model --kv", "model")
    assert done.exit_code == 1 and "--kv" in done.stderr
    with pytest.raises(ConfigurationError, match="Got unexpected extra argument"):
        parse_subject("one two")
