"""One checkpoint in the forms that the programs read, each made once under the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import CACHE, in_fresh_process, progress
from make_checkpoint import ensure_checkpoint

from headrace.loading import embedded_model
from peers.environments import drivers, ensure_environment, python_of, variables_of
from peers.make_compressed import convert

GGUF_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15}
"""Numbers of ``llama_ftype``."""
PLAIN_BACKEND = "x64"
"""llama.cpp's back end that every processor can load; quantizing needs no more."""
OPENVINO_OPTIONS = {
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"],
}
HEADRACE_FORMAT = "w4a8"


def ensure_form(shape: str, form: str) -> Path:
    """A checkpoint as "bf16" or "PROGRAM-FORMAT": a file or a directory.

    Args:
        shape: of ``make_checkpoint.py``, or "embedded" for the model that headrace ships.
    """
    checkpoint = embedded_model() if shape == "embedded" else CACHE / shape
    if not checkpoint.exists():
        in_fresh_process(ensure_checkpoint, shape)
    if form == "bf16":
        return checkpoint
    program, kind = form.split("-")
    target = CACHE / f"{shape}.peers" / (f"{kind}.gguf" if program == "gguf" else form)
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    source = checkpoint
    if program == "gguf" and kind != "bf16":
        source = ensure_form(shape, "gguf-bf16")
    progress(f"making {target}")
    MAKERS[program](source, partial, kind)
    return partial.rename(target)


def _make_gguf(source: Path, target: Path, kind: str) -> None:
    arguments = ["-m", "peers.make_gguf", source, target]
    if kind in GGUF_TYPES:
        arguments = ["-m", "peers.quantize_gguf", PLAIN_BACKEND, source, target]
        arguments.append(str(GGUF_TYPES[kind]))
    _call("llama_cpp", arguments)


def _make_openvino(source: Path, target: Path, kind: str) -> None:
    task = ["--task", "text-generation-with-past", *OPENVINO_OPTIONS[kind]]
    command = "from optimum.commands.optimum_cli import main; main()"
    _call("openvino", ["-c", command, "export", "openvino", "--model", source, *task, target])


def _make_vllm(source: Path, target: Path, kind: str) -> None:
    in_fresh_process(convert, source, target, kind)


def _make_headrace(source: Path, target: Path, kind: str) -> None:
    options = ["--format", HEADRACE_FORMAT, "-o", target]
    _call("headrace", ["-m", "headrace", "quantize", source, *options])


MAKERS: dict[str, Callable[[Path, Path, str], None]] = {
    "gguf": _make_gguf,
    "openvino": _make_openvino,
    "vllm": _make_vllm,
    "headrace": _make_headrace,
}


def _call(program: str, arguments: list[Any]) -> None:
    """Run Python in the environment of a program."""
    ensure_environment(program)
    variables = {**variables_of(program), "HF_HUB_OFFLINE": "1"}
    command = [python_of(program), *arguments]
    subprocess.run(command, check=True, stdout=2, cwd=drivers(), env=variables)


def weight_bytes(path: Path) -> int:
    """Bytes of the weights in a form."""
    if path.is_file():
        return path.stat().st_size
    names = ("*.safetensors", "openvino_model.bin")
    return sum(file.stat().st_size for name in names for file in path.glob(name))


def read_config(shape: str) -> dict[str, Any]:
    """The sizes of a checkpoint."""
    config: dict[str, Any] = json.loads((CACHE / shape / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config
