"""``headrace methods``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from headrace.evaluation.measured import merge_measurements
from headrace.methods import known_methods
from tests.cli.programs import invoke
from tests.evaluation.test_measured import ROW
from tests.llm.test_methods import OUTSIDE


def test_all_methods_are_listed() -> None:
    result = invoke("methods", "--json")
    assert result.exit_code == 0
    listed = {card["name"]: card for card in json.loads(result.stdout)}
    assert list(listed) == list(known_methods())
    card = listed["random-eviction"]
    assert (card["guarantee"], card["breaks"]) == ("lossy", ["WHOLE_PAST"])
    assert "TOKEN_ORDER" in card["requires"]
    assert card["options"]["keep"]["default"] == 0.25
    plain = invoke("methods").stdout
    assert all(name[:12] in plain for name in listed)


def test_the_card_of_one() -> None:
    result = invoke("methods", "random-eviction")
    assert result.exit_code == 0
    for part in ("breaks that", "the cache holds every token", "keep", "0.25", "engine, request"):
        assert part in result.stdout


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what was measured is, and nothing else."""
    monkeypatch.setattr("headrace.evaluation.measured.cards_directory", lambda: tmp_path)
    return tmp_path


def test_a_card_shows_what_was_measured(cards: Path) -> None:
    merge_measurements(cards / "kivi.json", ROW.part, [ROW])
    shown = invoke("methods", "kivi").stdout
    for part in (ROW.what, "12.5 (12 to 13)", "plain 10, p = 0.5", ROW.claim, ROW.machine):
        assert part in " ".join(shown.replace("│", " ").split()), part
    described = json.loads(invoke("methods", "kivi", "--json").stdout)
    assert described["measured"] == [asdict(ROW)]


def test_a_card_says_that_nothing_was_measured(cards: Path) -> None:
    assert "nothing so far" in invoke("methods", "kivi").stdout
    assert json.loads(invoke("methods", "kivi", "--json").stdout)["measured"] == []


def test_a_broken_file_of_measurements(cards: Path) -> None:
    (cards / "kivi.json").write_text("{")
    result = invoke("methods", "kivi")
    assert result.exit_code == 1
    assert "method: kivi: " in result.output
    assert invoke("methods", "gear").exit_code == 0


def test_a_card_from_outside_the_tree(tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text(OUTSIDE)
    card = json.loads(invoke("methods", f"{file}:Nothing", "--json").stdout)
    assert card["name"] == "my-method"
    assert card["options"]["times"] == {"default": 1, "meaning": "how often. (int)"}
    generated = ("--max-tokens", "2", "--temperature", "0", "--json", "import os")
    result = invoke("run", "--method", f"{file}:Nothing:times=2", *generated)
    assert result.exit_code == 0


def test_an_unknown_method() -> None:
    result = invoke("methods", "nothing")
    assert result.exit_code == 1
    assert "'nothing' is unknown; known: " in result.output
