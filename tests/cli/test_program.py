"""The program as a whole: help, version, exit codes, errors."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import headrace
from headrace.cli import main
from tests.cli.programs import invoke, start


def test_the_entry_point() -> None:
    (script,) = entry_points(group="console_scripts", name="headrace")
    assert script.load() is main


def test_version(tmp_path: Path) -> None:
    with start("--version", cwd=tmp_path) as program:
        out, err = program.communicate()
    assert (program.returncode, out, err) == (0, f"headrace {headrace.__version__}\n", "")


@pytest.mark.parametrize("command", ["run", "serve", "doctor", "bench latency", "bench serve"])
def test_help_loads_no_heavy_package(command: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom headrace.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'tokenizers', 'httpx'} & set(sys.modules)\n"
        "print(code, heavy, file=sys.stderr)"
    )
    arguments = [sys.executable, "-c", code, *command.split(), "--help"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == "0 set()\n"
    assert "Usage: headrace" in done.stdout


def test_an_error_is_one_line(tmp_path: Path) -> None:
    with start("run", "hi", "--model", str(tmp_path / "none"), cwd=tmp_path) as program:
        out, err = program.communicate()
    assert (program.returncode, out) == (1, "")
    assert err.startswith("headrace: ")
    assert str(tmp_path / "none") in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with start("--debug", "run", "hi", "--temperature", "-1", cwd=tmp_path) as program:
        _, err = program.communicate()
    assert program.returncode == 1
    assert "Traceback" in err
    assert "InvalidRequestError: temperature" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "hi", "--temperature", "-1"], "temperature: must be at least 0"),
        (["run", "hi", "--max-tokens", "-1"], "max_tokens: must be at least 0"),
        (["run", "hi", "--top-p", "2"], "top_p: must be"),
        (["run", "hi", "--stop", ""], "stop: a stop string must not be empty"),
        (["run", ""], "prompt: is empty"),
        (["run", "hi", "--max-num-seqs", "0"], "max_num_seqs: must be an integer of at least 1"),
        (["serve", "--dtype", "int3"], "dtype: must be one of"),
        (["bench", "serve", "--request-rate", "0"], "request_rate: must be above 0"),
        (["bench", "serve", "--num-prompts", "0"], "num_prompts: must be at least 1"),
        (["bench", "serve", "--api", "poems"], "api: must be one of completions, chat"),
        (["doctor", "--reference", "--dtype", "bfloat16"], "dtype: reference mode"),
    ],
)
def test_values_out_of_range(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before anything is loaded: loading would fail here."""
    monkeypatch.setitem(sys.modules, "headrace.llm", None)
    monkeypatch.setitem(sys.modules, "headrace.ops.device", None)
    monkeypatch.setitem(sys.modules, "headrace.cli.bench.load", None)
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"headrace: {message}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["walk"],
        ["run", "hi", "--top-q", "1"],
        ["run", "hi", "--max-tokens", "many"],
        ["run", "hi", "--kv-cache-memory", "2 apples"],
        ["run", "hi", "--system", "be brief", "--raw"],
        ["serve", "--port", "65536"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr
