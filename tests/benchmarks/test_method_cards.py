"""The cards' benchmark: which parts there are, what is kept, and that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headrace.evaluation.measured import Measurement, read_measurements
from headrace.methods import known_methods
from tests.benchmarks.test_benchmarks import output_of
from tests.evaluation.test_measured import mistakes

ROUNDS = 2


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program as a module; to look at the machine takes a second."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import method_cards

    monkeypatch.setattr(method_cards, "describe_machine", lambda: "a machine")
    module: ModuleType = method_cards
    return module


def measuring(
    monkeypatch: pytest.MonkeyPatch, benchmark: ModuleType, broken: str = ""
) -> list[str]:
    """The parts that are measured from now on, each of which finds a row of each method."""
    ran: list[str] = []

    def fake(function: Callable[..., Any], part: str, rounds: int, quick: bool) -> Any:
        if part == broken:
            raise RuntimeError("no disk")
        ran.append(part)
        [methods] = [each.methods for each in benchmark.PARTS if each.name == part]
        return {
            method: [asdict(Measurement(part, float(len(ran)), "1 round", "a model", method))]
            for method in methods
        }

    monkeypatch.setattr(benchmark, "in_fresh_process", fake)
    return ran


def test_every_method_is_measured(benchmark: ModuleType) -> None:
    assert set(benchmark.methods_of_the_house()) == set(known_methods())


def test_parts_of_a_method(benchmark: ModuleType) -> None:
    of_codecs = [part.name for part in benchmark.choose_parts(["kivi"], ())]
    assert len(of_codecs) > 2 and "cache.pages" not in of_codecs
    named = benchmark.choose_parts(["kivi", "h2o"], ["cache.codec_text", "steering.speed"])
    assert [part.name for part in named] == ["cache.codec_text"]


def test_an_interrupted_run_goes_on(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = benchmark.choose_parts(["h2o"], ())
    names = [part.name for part in parts]
    ran = measuring(monkeypatch, benchmark, broken=names[2])
    [reason] = benchmark.measure_parts(parts, ROUNDS, True, tmp_path, False)
    assert reason == f"{names[2]}: RuntimeError: no disk"
    assert ran == [*names[:2], *names[3:]]
    again = measuring(monkeypatch, benchmark)
    assert benchmark.measure_parts(parts, ROUNDS, True, tmp_path, False) == []
    assert again == [names[2]]
    rows = read_measurements(tmp_path / "scissorhands.json")
    assert sorted(row.what for row in rows) == sorted(row.part for row in rows) == sorted(names)
    assert [*mistakes(tmp_path / "scissorhands.json")] == []
    anew = measuring(monkeypatch, benchmark)
    assert benchmark.measure_parts(parts, ROUNDS, True, tmp_path, False) == []
    assert anew == names


@pytest.mark.parametrize("changed", ["rounds", "fresh"])
def test_a_run_that_begins_anew(
    changed: str, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = benchmark.choose_parts(["gear"], ())
    measuring(monkeypatch, benchmark, broken=parts[-1].name)
    assert benchmark.measure_parts(parts, ROUNDS, True, tmp_path, False)
    again = measuring(monkeypatch, benchmark)
    rounds = ROUNDS + (changed == "rounds")
    assert benchmark.measure_parts(parts, rounds, True, tmp_path, changed == "fresh") == []
    assert again == [part.name for part in parts]


PARTS = ("cache.codec_bytes", "steering.recording", "steering.speed")


def test_it_runs(repository: Path, tmp_path: Path) -> None:
    """Parts of three kinds: tables have all rows, and files say how they came to be."""
    cards = tmp_path / "cards"
    options = ("--quick", "--rounds", "1", "--json", "--output", str(cards))
    chosen = [word for part in PARTS for word in ("--part", part)]
    result = json.loads(output_of(repository, tmp_path, "method_cards.py", *options, *chosen))
    files = {path.stem: path for path in cards.glob("*.json")}
    assert set(files) == {"gear", "kivi", "activation-recorder", "inference-time-intervention"}
    assert {name: [*mistakes(path)] for name, path in files.items()} == {name: [] for name in files}
    rows = [row for path in files.values() for row in read_measurements(path)]
    assert len(result["rows"]) == len(rows)
    assert {row.part for row in rows} == set(PARTS)
    sizes = [row for row in rows if row.part == "cache.codec_bytes"]
    assert all(row.beside is not None and row.value < row.beside["plain"] for row in sizes)
    same = [row.value for row in rows if row.part == "steering.recording"]
    assert same == [1.0]
