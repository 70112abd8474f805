"""``headrace quantize``, and the formats of weights on ``headrace run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.programs import invoke

PROMPT = "def fibonacci(n):"


def run(*arguments: str) -> Any:
    """The result of a short greedy completion in fp32."""
    options = ("--dtype", "float32", "--temperature", "0", "--max-tokens", "8", "--json")
    done = invoke("run", PROMPT, *options, *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["token_ids"]


@pytest.fixture(scope="module")
def packed(embedded_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The embedded model in 4 bits, and what was printed."""
    directory = tmp_path_factory.mktemp("packed") / "model"
    done = invoke(
        "quantize", str(embedded_dir), "--format", "w4a8-g64", "-o", str(directory), "--json"
    )
    assert done.exit_code == 0, done.output
    return directory, json.loads(done.stdout)


def test_from_a_model_to_a_completion(packed: tuple[Path, Any]) -> None:
    directory, _ = packed
    tokens = run("--model", str(directory))
    assert len(tokens) == 8
    assert tokens == run("--weights", "w4a8-g64")


def test_parts_are_counted(packed: tuple[Path, Any]) -> None:
    directory, printed = packed
    assert printed["output"] == str(directory)
    assert (printed["weight_format"], printed["head_format"]) == ("w4a8-g64", "w8a8")
    layers = 4 * 256 * (512 + 256 + 1024 + 512)
    assert printed["layer_bytes"] == layers * 4.25 / 8
    assert printed["head_bytes"] == 4096 * (256 + 4)
    assert printed["embedding_bytes"] == 0
    assert printed["vector_bytes"] == 9 * 256 * 2
    parts = ("layer_bytes", "head_bytes", "embedding_bytes", "vector_bytes")
    assert printed["num_bytes"] == sum(printed[part] for part in parts)
    size = (directory / "model.safetensors").stat().st_size
    assert printed["num_bytes"] < size < printed["num_bytes"] + 100_000


def test_the_table(embedded_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    options = ("--format", "w8a8", "--head-format", "bf16", "-o", str(target))
    done = invoke("quantize", str(embedded_dir), *options)
    assert done.exit_code == 0, done.output
    assert str(target) in done.stdout.replace("\n", "")
    rows = [line.split("│")[1:4] for line in done.stdout.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["output head", "bf16", "2 MiB"] in cells
    assert cells[0][:2] == ["linear weights", "w8a8"]


def test_an_existing_directory_needs_force(embedded_dir: Path, packed: tuple[Path, Any]) -> None:
    directory, _ = packed
    options = ("--format", "w4a8-g64", "-o", str(directory))
    done = invoke("quantize", str(embedded_dir), *options)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("headrace: output: ") and "--force" in done.stderr
    assert invoke("quantize", str(embedded_dir), *options, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "w5"), "headrace: weights: weight format 'w5' is unknown"),
        (("--head-format", "w5"), "headrace: head_weights: weight format 'w5' is unknown"),
        (("--quantizer", "magic"), "headrace: quantizer: 'magic' is unknown"),
    ],
)
def test_unknown_names(
    arguments: tuple[str, ...], message: str, embedded_dir: Path, tmp_path: Path
) -> None:
    done = invoke("quantize", str(embedded_dir), "-o", str(tmp_path / "model"), *arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(message)
    assert not (tmp_path / "model").exists()
