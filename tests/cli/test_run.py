"""``headrace run`` on the embedded model."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from headrace import LLM, SamplingParams
from tests.cli.programs import Terminal, invoke, start

PROMPT = "def fibonacci(n):"
GREEDY = ("--temperature", "0")
SPEED = re.compile(
    r"prompt \d+ tokens \(\d+ cached, [\d.,]+ tok/s\), output (\d+) tokens \([\d.,]+ tok/s\), "
    r"first token after [\d.,]+ ms\n"
)


@pytest.fixture(scope="module")
def expected() -> str:
    """What the embedded model adds to the prompt, greedily, within 24 tokens."""
    with LLM(dtype="float32") as llm:
        params = SamplingParams(max_tokens=24, temperature=0.0)
        return llm.generate(PROMPT, params)[0].outputs[0].text


def run(*arguments: str, stdin: str | bytes | None = None) -> Any:
    return invoke("run", "--dtype", "float32", *arguments, stdin=stdin)


def run_json(*arguments: str, stdin: str | bytes | None = None) -> Any:
    done = run(*arguments, "--json", stdin=stdin)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_a_prompt_is_completed(expected: str) -> None:
    done = run(PROMPT, *GREEDY, "--max-tokens", "24")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected + "\n"
    match = SPEED.fullmatch(done.stderr)
    assert match is not None, done.stderr
    assert 0 < int(match[1]) <= 24


def test_the_program_itself(expected: str, tmp_path: Path) -> None:
    options = ("--dtype", "float32", *GREEDY, "--max-tokens", "24")
    with start("run", PROMPT, *options, cwd=tmp_path) as program:
        out, err = program.communicate()
    assert (program.returncode, out) == (0, expected + "\n")
    assert SPEED.fullmatch(err)


def test_stdin_is_the_prompt(expected: str) -> None:
    done = run(*GREEDY, "--max-tokens", "24", stdin=PROMPT)
    assert done.stdout == expected + "\n"


def test_a_prompt_goes_before_stdin(expected: str) -> None:
    done = run(PROMPT, *GREEDY, "--max-tokens", "24", stdin="import os")
    assert done.stdout == expected + "\n"


def test_json(expected: str) -> None:
    result = run_json(PROMPT, *GREEDY, "--max-tokens", "24")
    assert result["model"] == "headrace-embedded"
    assert (result["prompt"], result["text"]) == (PROMPT, expected)
    assert result["finish_reason"] in ("length", "stop")
    timing = result["timing"]
    assert timing["prompt_tokens"] == len(result["prompt_token_ids"])
    assert timing["output_tokens"] == len(result["token_ids"])
    assert timing["time_to_first_token"] > 0


def test_a_stop_string_ends_the_text(expected: str) -> None:
    end = expected.strip()[3:6]
    result = run_json(PROMPT, *GREEDY, "--max-tokens", "24", "--stop", end)
    assert (result["finish_reason"], result["stop_reason"]) == ("stop", end)
    assert result["text"] == expected[: expected.index(end)]


def test_the_seed_decides() -> None:
    options = (PROMPT, "--temperature", "1.5", "--max-tokens", "16", "--ignore-eos")
    tokens = [run_json(*options, "--seed", seed)["token_ids"] for seed in ("1", "1", "2")]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(tokens[0]) == 16


def test_answers_fit_the_context() -> None:
    options = ("--max-model-len", "64", "--ignore-eos")
    assert len(run_json(PROMPT, *options)["token_ids"]) == 64 - 9
    done = run(PROMPT, *options, "--max-tokens", "60")
    assert done.exit_code == 1
    assert done.stderr.startswith("headrace: max_tokens: 60 tokens do not fit")
    done = run(PROMPT * 20, *options)
    assert done.exit_code == 1
    assert done.stderr.startswith("headrace: prompt: ")


def test_chat_applies_the_template() -> None:
    with LLM() as llm:
        tokenizer = llm.tokenizer
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    for arguments, wanted in (
        (("--chat",), messages[1:]),
        (("--system", "Short."), messages),
    ):
        result = run_json("Hi", *arguments, "--max-tokens", "1")
        text = tokenizer.apply_chat_template(wanted)
        assert result["prompt_token_ids"] == tokenizer.encode(text, add_special_tokens=False)
    plain = run_json("Hi", "--max-tokens", "1")
    assert plain["prompt_token_ids"] == tokenizer.encode("Hi")


@pytest.fixture
def copied_model(embedded_dir: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model, to be changed."""
    return Path(shutil.copytree(embedded_dir, tmp_path / "model"))


def test_chat_without_a_template(copied_model: Path) -> None:
    settings = copied_model / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    del config["chat_template"]
    settings.write_text(json.dumps(config))
    done = run("Hi", "--chat", "--model", str(copied_model))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no chat template" in done.stderr


def test_a_failing_request_is_reported(copied_model: Path) -> None:
    path = copied_model / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    done = run("Hi", "--model", str(copied_model))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("headrace: ")
    assert "NaN" in done.stderr


def test_stdin_that_is_no_text() -> None:
    done = run(stdin=b"caf\xe9")
    assert done.exit_code == 1
    assert done.stderr.startswith("headrace: prompt: stdin is not valid UTF-8")


def test_empty_stdin() -> None:
    done = run(stdin="")
    assert done.exit_code == 1
    assert done.stderr.startswith("headrace: prompt: is empty")


def test_an_interrupt_ends_the_program(tmp_path: Path) -> None:
    options = ("--max-tokens", "2000", "--ignore-eos")
    with start("run", PROMPT, *options, cwd=tmp_path) as program:
        assert program.stdout is not None
        program.stdout.read(1)
        program.send_signal(signal.SIGINT)
        _, err = program.communicate()
    assert program.returncode == 130
    assert "Traceback" not in err


def test_a_reader_that_leaves_ends_the_program(tmp_path: Path) -> None:
    options = ("--max-tokens", "2000", "--ignore-eos")
    with start("run", PROMPT, *options, cwd=tmp_path) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.read(1)
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == 1


def test_at_a_terminal_the_prompt_comes_first(expected: str, tmp_path: Path) -> None:
    options = ("--dtype", "float32", *GREEDY, "--max-tokens", "24")
    with Terminal("run", PROMPT, *options, cwd=tmp_path) as terminal:
        shown = terminal.read_until("first token after")
        assert terminal.wait() == 0
    assert "weights float32, 13.01 MiB in all; output head float32, 4 MiB" in shown
    assert (PROMPT + expected).replace("\n", "\r\n") in shown
