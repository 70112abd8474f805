"""``headrace methods``: what methods there are, and the card of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from headrace.cli.options import Json, meanings
from headrace.cli.output import Table, report, show

if TYPE_CHECKING:
    from headrace.contracts.method import Method
    from headrace.evaluation.measured import Measurement

Name = typer.Argument(
    help='Of a method, or "FILE.py:CLASS"; all are listed without.', show_default=False
)


def methods(name: Annotated[str | None, Name] = None, as_json: Json = False) -> None:
    """List the methods, or show the card of one, with what was measured of it.

    Use one with --method NAME:OPTION=VALUE,... of the commands that load a model.
    """
    from headrace.methods import find_method, known_methods

    if name is None:
        kinds = [find_method(each) for each in known_methods()]
        rows = [(kind.name(), kind.card.guarantee, kind.card.summary) for kind in kinds]
        cards = [describe(kind) for kind in kinds]
        report(cards, ("methods", ("name", "results", "what it does"), rows), as_json=as_json)
        return
    kind = find_method(name)
    measured = _measured(kind)
    described = {**describe(kind), "measured": [asdict(row) for row in measured]}
    report(described, *card_tables(kind), *measured_tables(measured), as_json=as_json)


def _measured(kind: type[Method]) -> list[Measurement]:
    from headrace.errors import ConfigurationError
    from headrace.evaluation.measured import measurements_of

    try:
        return measurements_of(kind)
    except ValueError as error:
        raise ConfigurationError(f"method: {kind.name()}: {error}") from None


def describe(kind: type[Method]) -> dict[str, Any]:
    """A card as JSON, without what was measured."""
    card = asdict(kind.card)
    properties = {
        "requires": kind.requires(),
        "breaks": kind.breaks(),
        "preserves": kind.preserves(),
    }
    card |= {name: sorted(each.name for each in found) for name, found in properties.items()}
    options = {row[0]: {"default": row[1], "meaning": row[3]} for row in option_rows(kind)}
    return {"name": kind.name(), **card, "options": options}


def option_rows(kind: type[Method]) -> list[tuple[str, Any, str, str]]:
    """Name, default, who sets it, and meaning, of each option."""
    meaning, hints = meanings(kind), get_type_hints(kind)
    of_requests = kind.card.request_options or ()
    rows = []
    for field in fields(kind):  # type: ignore[arg-type]
        default = "" if field.default is MISSING else field.default
        setter = "engine, request" if field.name in of_requests else "engine"
        text = f"{meaning[field.name]} ({hints[field.name].__name__})"
        rows.append((field.name, default, setter, text))
    return rows


def card_tables(kind: type[Method]) -> list[Table]:
    """A card for people."""
    card = kind.card
    facts = [
        ("paper", card.title or "none"),
        ("results", card.guarantee),
        ("needs that", "; ".join(sorted(each.value for each in kind.requires())) or "nothing"),
        ("breaks that", "; ".join(sorted(each.value for each in kind.breaks())) or "nothing"),
        ("preserves that", "; ".join(sorted(each.value for each in kind.preserves()))),
        ("chosen by", "the engine" if card.request_options is None else "the engine, requests"),
    ]
    return [
        (f"{kind.name()}: {card.summary}", ("", ""), facts),
        ("options", ("name", "default", "set by", "meaning"), option_rows(kind)),
    ]


MEASURED = ("what", "value", "of", "beside", "paper")


def measured_tables(rows: Sequence[Measurement]) -> list[Table]:
    """What was measured, for people: a table for each model and options, and how."""
    if not rows:
        return [("measured", ("",), [("nothing so far",)])]
    tables: dict[tuple[str, str, str], list[tuple[str, ...]]] = {}
    for row in rows:
        lines = tables.setdefault((row.options, row.model, row.basis), [])
        lines.append((row.what, _value(row), row.sample, _beside(row), row.claim))
    how = dict.fromkeys((row.command, row.machine, row.day) for row in rows)
    found: list[Table] = []
    for (options, model, basis), lines in tables.items():
        title = f"measured: {options}, on {model}{f'; {basis}' if basis else ''}"
        found.append((title, MEASURED, lines))
    return [*found, ("measured with", ("command", "machine", "day"), list(how))]


def _value(row: Measurement) -> str:
    """A value and its interval."""
    if row.low is None or row.high is None:
        return show(row.value)
    return f"{show(row.value)} ({show(row.low)} to {show(row.high)})"


def _beside(row: Measurement) -> str:
    """What it stands beside, and how likely chance alone makes as much of a difference."""
    parts = [f"{label} {show(value)}" for label, value in (row.beside or {}).items()]
    if row.p_value is not None:
        parts.append(f"p = {row.p_value:.2g}")
    return ", ".join(parts)
