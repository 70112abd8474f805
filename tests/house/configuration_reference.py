"""Writes docs/configuration.md: ``python -m tests.house.configuration_reference``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import typer

from headrace.cli.app import app
from headrace.cli.options import meanings
from headrace.config import EngineConfig
from headrace.contracts.sampling import SamplingParams
from tests.house.source import ROOT

PAGE = ROOT / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by tests/house/configuration_reference.py from the code; edit the docstrings there. -->

There is one flat set of engine options, `EngineConfig`, and one of request fields,
`SamplingParams`. Names follow vLLM's where it has one. No environment variable changes what the
engine does.

The same options are keyword arguments in Python and flags on the command line:

```python
from headrace import LLM, SamplingParams

with LLM(max_model_len=512, enable_prefix_caching=False) as llm:
    outputs = llm.generate("import os", SamplingParams(max_tokens=8, temperature=0))
```

```bash
headrace run --max-model-len 512 --no-prefix-caching --max-tokens 8 --temperature 0 "import os"
```
"""
ENGINE = """
## Engine options

Fields of `EngineConfig`; flags of `headrace run`, `serve`, `bench latency` and `bench throughput`.
"""
SAMPLING = """
## Request fields

Fields of `SamplingParams`; flags of `headrace run`. On the command line, over HTTP, and in Python
where no `SamplingParams` is given, what the model's `generation_config.json` recommends comes
before the defaults below. `headrace run` generates up to 256 tokens by default, a chat over HTTP
as many as fit.
"""


def flags() -> dict[str, str]:
    """Parameter name -> flags, of ``headrace run``, which takes every option."""
    group: Any = typer.main.get_command(app)
    options = (p for p in group.commands["run"].params if p.opts[0].startswith("-"))
    return {
        option.name: " ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        for option in options
    }


def table(cls: Any, command_line: dict[str, str]) -> str:
    """One row per field of a dataclass."""
    meaning = meanings(cls)
    rows = ["| field | flag | type | default | meaning |", "|---|---|---|---|---|"]
    for field in fields(cls):
        name, flag = f"`{field.name}`", command_line.get(field.name, "")
        kind, text = f"`{field.type}`".replace("|", "\\|"), meaning[field.name].replace("``", "`")
        rows.append(f"| {name} | {flag} | {kind} | `{field.default}` | {text} |")
    return "\n".join(rows) + "\n"


def render() -> str:
    """The whole page."""
    command_line = flags()
    parts = (HEAD, ENGINE, "\n", table(EngineConfig, command_line))
    return "".join((*parts, SAMPLING, "\n", table(SamplingParams, command_line)))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
