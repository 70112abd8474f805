"""The benchmark scripts run; what they measure is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace import LLM, SamplingParams


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory of its own, under which the scripts keep their checkpoints."""
    return tmp_path


def output_of(repository: Path, home: Path, script: str, *arguments: str) -> str:
    """What a script prints."""
    command = [sys.executable, str(repository / "benchmarks" / script), *arguments]
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_checkpoint_loads(repository: Path, home: Path) -> None:
    directory = output_of(repository, home, "make_checkpoint.py", "--shape", "tiny").strip()
    assert Path(directory).is_relative_to(home)
    with LLM(directory) as llm:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        assert len(llm.generate([[300, 301]], params)[0].outputs[0].token_ids) == 4
        assert llm.model_info.num_parameters == 3_279_104


@pytest.mark.parametrize("program", ["headrace", "transformers"])
def test_both_programs_measure_the_same_things(program: str, repository: Path, home: Path) -> None:
    arguments = ("--worker", program, "--shape", "tiny", "--threads", "1")
    figures = json.loads(output_of(repository, home, "against_transformers.py", *arguments))
    assert set(figures) == {"prefill", "decode", "batch"}
    assert all(value > 0 for value in figures.values())


@pytest.mark.parametrize(
    "command",
    [
        ("prefix_caching.py",),
        ("engine_overhead.py", "--tokens", "12"),
        ("startup.py",),
        ("simulate.py", "--requests", "600"),
    ],
)
def test_results_are_tables(command: tuple[str, ...], repository: Path, home: Path) -> None:
    table = json.loads(output_of(repository, home, *command, "--json", "--rounds", "1"))
    assert table["title"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert all(row[1] > 0 for row in table["rows"])


def test_every_benchmark_is_explained(repository: Path) -> None:
    folder = repository / "benchmarks"
    page = (folder / "README.md").read_text()
    for script in folder.glob("*.py"):
        assert script.name == "harness.py" or f"python benchmarks/{script.name}`" in page
