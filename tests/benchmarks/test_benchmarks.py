"""The benchmarks run; what they measure is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace import LLM, SamplingParams

BENCHMARKS = (
    *("against_transformers", "engine_overhead", "prefix_caching", "startup", "simulate"),
    *("kernels", "block_kernels", "stored_formats", "thread_pools", "offload"),
)


def output_of(repository: Path, home: Path, script: str, *arguments: str) -> str:
    """What a script prints; it keeps its files in the home directory ``home``."""
    command = [sys.executable, str(repository / "benchmarks" / script), *arguments]
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tasks_for_lm_eval(repository: Path, tmp_path: Path) -> None:
    printed = output_of(repository, tmp_path, "lm_eval_tasks.py", str(tmp_path), "--count", "3")
    names = printed.split("--tasks ")[1].split()[0].split(",")
    assert len(names) == 3
    for name in names:
        settings = json.loads((tmp_path / f"{name}.yaml").read_text())
        rows = Path(settings["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        assert settings["task"] == name and len(rows) == 3
        for row in map(json.loads, rows):
            assert row["question"] and row["answer"]


def test_two_installations_take_turns(repository: Path, tmp_path: Path) -> None:
    options = ("--starts", "2", "--pairs", "2", "--json")
    printed = output_of(repository, tmp_path, "two_installations.py", sys.executable, *options)
    table = json.loads(printed)
    assert len(table["ratios"]) == 4
    assert 0 < table["low"] <= table["ratio"] <= table["high"]


def test_the_checkpoint_loads(repository: Path, tmp_path: Path) -> None:
    directory = output_of(repository, tmp_path, "make_checkpoint.py", "tiny").strip()
    assert Path(directory).is_relative_to(tmp_path)
    with LLM(directory) as llm:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        assert len(llm.generate([[300, 301]], params)[0].outputs[0].token_ids) == 4
        assert llm.model_info.num_parameters == 3_279_104


@pytest.mark.parametrize("name", BENCHMARKS)
def test_results_are_tables(name: str, repository: Path, tmp_path: Path) -> None:
    options = ("--only", name, "--quick", "--json", "--rounds", "1")
    table = json.loads(output_of(repository, tmp_path, "run_all.py", *options))
    assert table["title"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert all(value > 0 for row in table["rows"] for value in row[1:])


def test_weight_formats_lose_what_their_bits_say(repository: Path, tmp_path: Path) -> None:
    options = ("--only", "weight_formats", "--quick", "--json", "--rounds", "1")
    table = json.loads(output_of(repository, tmp_path, "run_all.py", *options))
    column = table["columns"].index("mean KL")
    loss = {tuple(row[:2]): row[column] for row in table["rows"]}
    assert loss["bf16", "bf16"] == 0
    ascending = ("w8a8", "w4a8-g32", "w4a8-g64", "w4a8-g128")
    losses = [loss[name, "w8a8"] for name in ascending]
    assert losses[0] > 0 and losses == sorted(losses)


def test_every_benchmark_is_explained(repository: Path) -> None:
    page = (repository / "benchmarks" / "README.md").read_text()
    for name in (*BENCHMARKS, "weight_formats", "method_cards"):
        assert (repository / "benchmarks" / f"{name}.py").is_file()
        assert f"`python benchmarks/run_all.py --only {name}`" in page
