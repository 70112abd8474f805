"""What commands print: tables or JSON on stdout, notes and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

Face = TypeVar("Face")

Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]
"""Title, headings and rows; the first cell of a row names it."""


def report(result: Any, *tables: Table, as_json: bool) -> None:
    """Print ``result`` as one JSON object, or the tables that show it to people."""
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(markup=False, highlight=False)
    for title, columns, rows in tables:
        table = RichTable()
        for index, column in enumerate(columns):
            numeric = all(isinstance(row[index], (int, float)) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(show, row))
        console.print(title, style="bold")
        console.print(table)


def rows_of(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Rows of a two-column table of those values that are numbers."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return [(name.replace("_", " "), value) for name, value in numbers.items()]


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr when a person is watching; it moves when told what is done, and of how much.

    Until then it only shows that something is under way.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    columns = (TextColumn(text), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def load(face: Callable[..., Face], engine: Mapping[str, Any]) -> Face:
    """An ``LLM`` or ``AsyncLLM`` of these options; a person sees a bar, then what was loaded."""
    with progress("loading the model") as advance:
        loaded: Any = face(**engine, progress=advance)
    if sys.stderr.isatty():
        info = loaded.model_info
        note(
            f"weights {info.weight_format}, {show_bytes(info.weight_bytes)} in all; output head "
            f"{info.head_format}, {show_bytes(info.head_bytes)}"
        )
        if not info.prefix_caching and engine.get("enable_prefix_caching") is None:
            note("prefix caching is off: this model does not allow it")
    return cast(Face, loaded)


def show(value: Any) -> str:
    """A value as people read it: three or four significant digits, thousands set apart."""
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show_bytes(count: float) -> str:
    """A number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
