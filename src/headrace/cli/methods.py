"""``headrace methods``: what methods there are, and the card of one."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from headrace.cli.options import Json, meanings
from headrace.cli.output import Table, report

if TYPE_CHECKING:
    from headrace.contracts.method import Method

Name = typer.Argument(
    help='Of a method, or "FILE.py:CLASS"; all are listed without.', show_default=False
)


def methods(name: Annotated[str | None, Name] = None, as_json: Json = False) -> None:
    """List the methods, or show the card of one.

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
    report(describe(kind), *card_tables(kind), as_json=as_json)


def describe(kind: type[Method]) -> dict[str, Any]:
    """A card as JSON."""
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
