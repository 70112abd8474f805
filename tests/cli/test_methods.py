"""``headrace methods``."""

from __future__ import annotations

import json
from pathlib import Path

from headrace.methods import known_methods
from tests.cli.programs import invoke
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
