"""What was measured of methods: a file for each, which ships with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from headrace.contracts.method import Method
from headrace.methods import known_methods

PLAIN = "plain"
"""The engine without the method, among what a measurement stands beside."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of a method's table.

    Args:
        what: was measured, with its unit.
        value: of the method.
        sample: what ``value`` is the mean or median of, such as "5 rounds" or "50 problems".
        low, high: of rounds, the lowest and highest; of problems and texts, the 95 % interval.
        beside: label -> the value of something else on the same work; the plain engine's if that
            has one.
        p_value: of the paired difference from the plain engine, where problems are the same.
        claim: what the paper says of it, on its models and machines; empty where it says nothing.
        model: that it was measured on.
        options: of the method, as it was chosen.
        basis: how the value was come by, if it was not just measured.
        part: of the benchmark that measured it.
        command, machine, day: with what, where and when (ISO 8601).
    """

    what: str
    value: float
    sample: str
    model: str
    options: str
    low: float | None = None
    high: float | None = None
    beside: Mapping[str, float] | None = None
    p_value: float | None = None
    claim: str = ""
    basis: str = ""
    part: str = ""
    command: str = ""
    machine: str = ""
    day: str = ""


def cards_directory() -> Path:
    """Where the files are that ship with the package."""
    return Path(str(resources.files("headrace") / "assets" / "cards"))


def read_measurements(path: Path) -> list[Measurement]:
    """The rows of a file; none if there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return []
    try:
        return [Measurement(**row) for row in json.loads(path.read_text("utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no measurements: {error}; measure again") from None


def merge_measurements(path: Path, part: str, rows: Sequence[Measurement]) -> None:
    """Let ``rows`` take the place of all that a part had measured; the other parts' rows stay.

    Raises:
        ValueError: see ``read_measurements``.
    """
    kept = [row for row in read_measurements(path) if row.part != part]
    merged = sorted([*kept, *rows], key=lambda row: row.part)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps([asdict(row) for row in merged], indent=1, ensure_ascii=False)
    partial.write_text(text + "\n", "utf-8")
    partial.rename(path)


def measurements_of(kind: type[Method]) -> list[Measurement]:
    """What was measured of a method of the house; nothing of others."""
    if known_methods().get(kind.name()) != kind.__module__:
        return []
    return read_measurements(cards_directory() / f"{kind.name()}.json")
