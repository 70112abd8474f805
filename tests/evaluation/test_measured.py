"""What was measured of methods: files are read, merged, and hold what tables need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from headrace.evaluation.measured import (
    PLAIN,
    Measurement,
    cards_directory,
    measurements_of,
    merge_measurements,
    read_measurements,
)
from headrace.methods import find_method, known_methods
from tests.llm.test_methods import OUTSIDE

ROW = Measurement(
    "decoding, tokens/s",
    12.5,
    "5 rounds",
    "a model",
    "kivi:bits=2",
    low=12.0,
    high=13.0,
    beside={PLAIN: 10.0},
    p_value=0.5,
    claim="3x",
    part="cache.speed",
    command="python benchmarks/method_cards.py --only kivi",
    machine="a machine",
    day="2026-01-31",
)


def mistakes(path: Path) -> Iterator[str]:
    """What is wrong with a file of measurements."""
    if path.stem not in known_methods():
        yield f"{path.stem} is no method"
    rows = read_measurements(path)
    if not rows:
        yield "no rows"
    for row in rows:
        texts = (row.what, row.sample, row.model, row.part, row.command, row.machine, row.day)
        if not all(texts):
            yield f"{row.what}: a field is empty"
        if row.options.partition(":")[0] != path.stem:
            yield f"{row.what}: measured of {row.options}"
        values = [row.value, *(row.beside or {}).values()]
        if not all(map(math.isfinite, values)):
            yield f"{row.what}: {values}"
        if (row.low is None) != (row.high is None):
            yield f"{row.what}: half an interval"
        if row.low is not None and row.high is not None and not row.low <= row.value <= row.high:
            yield f"{row.what}: {row.value} is not between {row.low} and {row.high}"
        try:
            date.fromisoformat(row.day)
        except ValueError:
            yield f"{row.what}: no day: {row.day}"
    if len({(row.what, row.model, row.options, row.basis) for row in rows}) != len(rows):
        yield "two rows say the same"


def test_what_ships_is_whole() -> None:
    """All files are of methods."""
    files = list(cards_directory().glob("*"))
    assert [path.name for path in files if path.suffix != ".json"] == []
    found = {path.name: [*mistakes(path)] for path in files}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nothing", {}),
        ("kivi", {"machine": ""}),
        ("kivi", {"value": math.nan}),
        ("kivi", {"value": 20.0}),
        ("kivi", {"low": None}),
        ("kivi", {"options": "gear:bits=2"}),
        ("kivi", {"day": "yesterday"}),
        ("kivi", None),
    ],
)
def test_the_check_finds(name: str, changes: dict[str, object] | None, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    rows = [] if changes is None else [replace(ROW, **changes)]  # type: ignore[arg-type]
    merge_measurements(path, ROW.part, rows)
    assert [*mistakes(path)]


def test_a_whole_file_passes(tmp_path: Path) -> None:
    merge_measurements(tmp_path / "kivi.json", ROW.part, [ROW])
    assert [*mistakes(tmp_path / "kivi.json")] == []


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kivi.json"
    least = Measurement("x", 1.0, "1 round", "a model", "kivi", part="cache.speed")
    assert read_measurements(path) == []
    merge_measurements(path, ROW.part, [ROW, least])
    assert read_measurements(path) == [ROW, least]


def test_a_part_measured_again_takes_the_place_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "kivi.json"
    other = replace(ROW, part="cache.bytes", what="bytes")
    merge_measurements(path, ROW.part, [ROW, replace(ROW, what="prompt, s")])
    merge_measurements(path, other.part, [other])
    again = replace(ROW, value=12.75)
    merge_measurements(path, ROW.part, [again])
    assert read_measurements(path) == [other, again]


@pytest.mark.parametrize("text", ["", "{", "3", "[1]", '[{"what": "x"}]', '[{"who": "x"}]'])
def test_a_file_of_something_else(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kivi.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"kivi.json holds no measurements: .*measure again"):
        read_measurements(path)


def test_measurements_are_of_methods_of_the_house(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method from outside the tree is not shown what one of the same name did."""
    cards = tmp_path / "cards"
    merge_measurements(cards / "kivi.json", ROW.part, [ROW])
    monkeypatch.setattr("headrace.evaluation.measured.cards_directory", lambda: cards)
    outside = tmp_path / "kivi.py"
    outside.write_text(OUTSIDE)
    assert measurements_of(find_method("kivi")) == [ROW]
    assert measurements_of(find_method("gear")) == []
    assert find_method(f"{outside}:Nothing").name() == "kivi"
    assert measurements_of(find_method(f"{outside}:Nothing")) == []
