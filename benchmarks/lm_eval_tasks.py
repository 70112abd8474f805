"""Write problems of the evaluation as tasks that lm-eval reads from local files.

python benchmarks/lm_eval_tasks.py DIRECTORY
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from headrace.evaluation.suite import make_task


@dataclass(frozen=True)
class LocalTask:
    """A level of a task, as lm-eval is to put it.

    Args:
        likelihood: ask how likely the answer is, rather than for a text that has it.
    """

    task: str
    level: str
    likelihood: bool


TASKS = (
    LocalTask("needle", "256", likelihood=True),
    LocalTask("code-completion", "line", likelihood=False),
    LocalTask("arithmetic", "2", likelihood=False),
)


def main() -> None:
    """Write a YAML file and its problems for each task, and say how to run them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=100, help="problems of each task")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    names = [write_task(each, options.directory.resolve(), options.count) for each in TASKS]
    print("lm_eval --include_path", options.directory, "--tasks", ",".join(names), "...")


def write_task(local: LocalTask, directory: Path, count: int) -> str:
    """Write a task's files and return its name."""
    task = make_task(local.task)
    name = f"headrace_{local.task.replace('-', '_')}"
    rows = directory / f"{name}.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for problem in islice(task.problems("test", local.level, 0), count):
            row = {"question": problem.context + problem.question, "answer": problem.answer}
            print(json.dumps(row), file=file)
    # lm-eval reads YAML, of which JSON is a part.
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        # Of an answer whose likelihood is asked, the space before it is a part.
        "doc_to_target": " {{answer}}" if local.likelihood else "{{answer}}",
        **(likelihood_settings() if local.likelihood else text_settings(local)),
    }
    (directory / f"{name}.yaml").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return name


def likelihood_settings() -> dict[str, Any]:
    """Whether the answer is the likeliest continuation, and how likely it is."""
    metrics = [{"metric": "acc"}, {"metric": "perplexity"}]
    return {"output_type": "loglikelihood", "metric_list": metrics}


def text_settings(local: LocalTask) -> dict[str, Any]:
    """A greedy completion, in which the answer is found as the task finds it."""
    task = make_task(local.task)
    answer = r"Answer: *(\S+)" if task.chat else r"\A\s*(.*?)\s*\Z"
    steps = [{"function": "regex", "regex_pattern": answer}, {"function": "take_first"}]
    return {
        "output_type": "generate_until",
        "generation_kwargs": {
            "until": list(task.stop) or ["<|end|>"],
            "max_gen_toks": task.max_tokens(local.level),
            "temperature": 0.0,
        },
        "filter_list": [{"name": "answer", "filter": steps}],
        "metric_list": [{"metric": "exact_match"}],
    }


if __name__ == "__main__":
    main()
