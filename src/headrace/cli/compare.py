"""``headrace compare``: two configurations on the same work, in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from headrace.cli.evaluate import SuiteName, TaskNames, parse_subject
from headrace.cli.options import Json
from headrace.cli.output import progress, report, show_bytes

First = typer.Argument(help="MODEL and options, quoted.", show_default=False)
Second = typer.Argument(help="MODEL and options, quoted.", show_default=False)
Temperature = typer.Option("--temperature", min=0.0, help="Of the completions; 0 is greedy.")
Seeds = typer.Option("--sampling-seeds", help="Of the draws of the first and of the second.")


def compare(
    first: Annotated[str, First],
    second: Annotated[str, Second],
    suite: Annotated[str, SuiteName] = "quick",
    task: Annotated[list[str] | None, TaskNames] = None,
    temperature: Annotated[float, Temperature] = 0.0,
    sampling_seeds: Annotated[tuple[int, int], Seeds] = (0, 0),
    as_json: Json = False,
) -> None:
    """Show how SECOND differs from FIRST: quality item by item, speed, memory.

    Example: headrace compare "path/to/model" "path/to/model --kv-cache-dtype int8"
    """
    from headrace.evaluation.comparison import Comparison
    from headrace.evaluation.suite import make_suite, make_task

    chosen = make_suite(suite)
    if task:
        wanted = {make_task(name).name for name in task}
        plans = tuple(plan for plan in chosen.plans if plan.task.name in wanted)
        chosen = replace(chosen, plans=plans)
    with progress("comparing") as advance:
        comparison = Comparison(
            parse_subject(first),
            parse_subject(second),
            chosen,
            temperature=temperature,
            sampling_seeds=sampling_seeds,
            notify=lambda done, total, name: advance(done, total),
        )
        result = comparison.run()
    report(result, *_tables(result), as_json=as_json)


def _tables(result: dict[str, Any]) -> list[Any]:
    """A result for people."""
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        if "skipped" in row:
            rows.append((row["measure"], "skipped", "", row["skipped"], ""))
            continue
        change = row["difference"]
        rows.append(
            (
                row["measure"],
                f"{row['means'][0]['mean']:.4f}",
                f"{row['means'][1]['mean']:.4f}",
                f"{change['mean']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})",
                f"{row['p_value']:.4f}{' *' if row['significant'] else ''}",
            )
        )
    speeds, memory = result["speeds"], result["memory"]
    costs = [_cost("first token, ms", *(1000 * speed["first_token"] for speed in speeds))]
    costs += [
        _cost(f"decode, batch {batch}, tok/s", *(speed["tokens"][batch] for speed in speeds))
        for batch in speeds[0]["tokens"]
    ]
    for name, key in (("weights", "weight_bytes"), ("KV at most", "kv_peak_bytes")):
        sizes = [each[key] for each in memory]
        costs.append((name, show_bytes(sizes[0]), show_bytes(sizes[1]), _ratio(*sizes)))
    names = result["subjects"]
    return [
        (
            "quality: * where chance alone would give as much in fewer than 5 % of all cases",
            ("measure", *names, "difference (95 % interval)", "p"),
            rows,
        ),
        ("cost, medians", ("", *names, "second / first"), costs),
    ]


def _cost(name: str, first: float, second: float) -> tuple[str, str, str, str]:
    return name, f"{first:.4g}", f"{second:.4g}", _ratio(first, second)


def _ratio(first: float, second: float) -> str:
    return f"{second / first:.3g}" if first else ""
