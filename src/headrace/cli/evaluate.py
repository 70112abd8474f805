"""``headrace eval``: measure a model, or what a configuration costs it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.options import ENGINE_OF_MODEL, Json, read_engine_options, takes
from headrace.cli.output import note, progress, report, show_bytes
from headrace.errors import ConfigurationError

if TYPE_CHECKING:
    from headrace.evaluation.evaluation import Subject

LOSSY = ("weights", "head_weights", "kv", "kv_cache_dtype", "methods")
"""Options that change what is computed; without them a configuration is its own reference."""

SuiteName = typer.Option("--suite", help="quick: minutes; full: half an hour.")
TaskNames = typer.Option("--task", help="Only this task of the suite (repeatable).")
Seed = typer.Option("--problem-seed", help="Of the problems.")
Output = typer.Option(
    "--output",
    "-o",
    help="Directory for the result, a record that an interrupted run goes on from, and plots of "
    "all results in it.",
    show_default=False,
)
Reference = typer.Option(
    "--reference",
    help="MODEL and options that predictions are compared with; MODEL without lossy options if "
    "not given.",
    show_default=False,
)
Check = typer.Option(
    "--check", help="Measure again what this page states, and compare.", show_default=False
)


@takes(engine=ENGINE_OF_MODEL)
def evaluate(
    engine: dict[str, Any],
    suite: Annotated[str, SuiteName] = "quick",
    task: Annotated[list[str] | None, TaskNames] = None,
    problem_seed: Annotated[int, Seed] = 0,
    reference: Annotated[str | None, Reference] = None,
    output: Annotated[Path | None, Output] = None,
    check: Annotated[Path | None, Check] = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL: loss on held-out text, divergence from a reference, and tasks.

    Example: headrace eval path/to/model --kv-cache-dtype int8
    """
    if check is not None:
        check_page(check)
        return
    result = run_evaluation(engine, suite, task, problem_seed, reference, output)
    report(result, *tables(result), as_json=as_json)
    if output is not None:
        keep(result, output)


def run_evaluation(
    engine: dict[str, Any],
    suite: str,
    tasks: list[str] | None,
    seed: int,
    reference: str | None,
    output: Path | None,
) -> dict[str, Any]:
    """Evaluate a configuration; see ``Evaluation.run``."""
    from headrace.evaluation.evaluation import Evaluation
    from headrace.evaluation.suite import make_suite, make_task

    chosen = make_suite(suite)
    if tasks:
        wanted = {make_task(name).name for name in tasks}
        plans = tuple(plan for plan in chosen.plans if plan.task.name in wanted)
        chosen = replace(chosen, plans=plans)
    subject = subject_of(engine)
    compared = reference_of(engine) if reference is None else parse_subject(reference)
    record = None if output is None else output / f"{slug(subject.label)}.{suite}.record.jsonl"
    with progress("evaluating") as advance:
        evaluation = Evaluation(
            chosen,
            subject,
            compared,
            record,
            seed,
            lambda done, total, name: advance(done, total),
        )
        return evaluation.run()


def subject_of(engine: dict[str, Any]) -> Subject:
    """A configuration, labelled by what it was asked for."""
    from headrace.evaluation.evaluation import Subject

    model = engine.get("model")
    name = "embedded" if model is None else Path(model).name
    options = [f"{key}={value}" for key, value in engine.items() if key in LOSSY]
    return Subject(" ".join([name, *options]), dict(engine))


def reference_of(engine: dict[str, Any]) -> Subject | None:
    """The configuration without what is lossy; ``None`` if nothing is."""
    plain = {key: value for key, value in engine.items() if key not in LOSSY}
    return None if plain == engine else subject_of(plain)


def parse_subject(text: str) -> Subject:
    """MODEL and options of the engine as they are written on the command line."""
    return subject_of(read_engine_options(shlex.split(text)))


def slug(label: str) -> str:
    """A label as a part of a file's name."""
    return re.sub(r"[^\w.=-]+", "_", label)


def tables(result: dict[str, Any]) -> list[Any]:
    """A result for people."""
    rows = []
    for row in result["rows"]:
        if "skipped" in row:
            rows.append((row["measure"], "skipped", row["skipped"], ""))
            continue
        interval = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
        rows.append((row["measure"], f"{row['mean']:.4f}", interval, f"{row['items']:,}"))
    facts = (
        f"{result['subject']}, suite {result['suite']}: mean score {result['score']:.3f}, "
        f"weights {show_bytes(result['weight_bytes'])}, KV at most "
        f"{show_bytes(result['kv_peak_bytes'])}, {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['seconds']:.0f} s"
    )
    return [(facts, ("measure", "mean", "95 % interval", "items"), rows)]


def keep(result: dict[str, Any], directory: Path) -> None:
    """Write a result, and plots of all results of the directory."""
    from headrace.evaluation.plots import draw

    name = f"{slug(result['subject'])}.{result['suite']}.json"
    partial = directory / f"{name}.partial"
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.rename(directory / name)
    found = sorted(directory.glob(f"*.{result['suite']}.json"))
    written = draw([json.loads(file.read_text("utf-8")) for file in found], directory)
    note("wrote " + ", ".join(str(file) for file in (directory / name, *written)))


COMMAND = re.compile(r"^<!-- headrace eval (.*?) -->\n((?:.*\n)*?)(?=^<!--|\Z)", re.MULTILINE)
ROW = re.compile(
    r"^\| (.+?) \| ([\d.]+) \| ([\d.]*)(?: to ([\d.]+))? \| ([\d,]+) \|$", re.MULTILINE
)


def markdown(result: dict[str, Any], command: str) -> str:
    """A result as a page states it, behind the command that measures it again."""
    [(_, columns, rows)] = tables(result)
    lines = [f"<!-- headrace eval {command} -->", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def check_page(page: Path) -> None:
    """Measure again what a page states. Exits with status 1 if a mean left its interval."""
    if not page.is_file():
        raise ConfigurationError(f"--check: {page} does not exist")
    stated = COMMAND.findall(page.read_text("utf-8"))
    if not stated:
        raise ConfigurationError(f"--check: {page} states no result of headrace eval")
    wrong = []
    for command, text in stated:
        words = shlex.split(command)
        suite = words[words.index("--suite") + 1] if "--suite" in words else "quick"
        if "--suite" in words:
            del words[words.index("--suite") : words.index("--suite") + 2]
        result = run_evaluation(read_engine_options(words), suite, None, 0, None, None)
        found = {row["measure"]: row for row in result["rows"]}
        for measure, mean, low, high, _ in ROW.findall(text):
            new = found.get(measure, {}).get("mean")
            bounds = (float(low), float(high)) if high else (0.99 * float(mean), 1.01 * float(mean))
            if new is None or not bounds[0] <= round(new, 4) <= bounds[1]:
                wrong.append(f"{command}: {measure}: the page says {mean}, measured {new}")
            else:
                note(f"{command}: {measure}: {mean} on the page, {new:.4f} measured")
    if wrong:
        raise ConfigurationError("\n".join([f"{page} is not true any more", *wrong]))
