"""Decoding from files as other programs quantize them, beside our formats of the same bits.

Weights are read whole for every token, so the limit is the bandwidth of memory over their bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cards.measuring import alone, fresh_prompts, greedy, times_of
from harness import Result, in_fresh_process, progress
from make_checkpoint import ensure_checkpoint, ensure_packed
from peers.models import ensure_form

from headrace import LLM
from headrace.ops.host import usable_cores
from headrace.plan.hardware import read_bandwidth

BUFFER = 4 << 30
PROMPT, ROWS = 32, (1, 16)
NOTE = (
    "w8a8 and Q8_0 have the same bits, as have w4a8, Q4_0 and Q4_K_M (which keeps some of its "
    "matrices in Q6_K). What the kernels of a type reach by themselves, and why some reach less, "
    "is said under native products with stored integers; Q4_K_M has more and smaller products too, "
    "since matrices of two types are not multiplied in one."
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A model in one form.

    Args:
        tokenizer: directory, for files that have none of ours.
    """

    name: str
    path: Path
    tokenizer: Path | None = None


def stored_models(quick: bool) -> list[Stored]:
    """Ours, then those of llama.cpp, each made once."""
    shape = "tiny" if quick else "llama-3.2-1b"
    tokenizer = ensure_checkpoint(shape)
    models = [Stored(name, ensure_packed(shape, name)) for name in ("w8a8", "w4a8")]
    if quick:
        return models
    for name in ("q8_0", "q4_0", "q4_k_m"):
        form = ensure_form(shape, f"gguf-{name}")
        models.append(Stored(f"GGUF {name.upper()}", form, tokenizer))
    return models


def measure(rounds: int, quick: bool) -> Result:
    """All forms in turn, in one process."""
    buffer, tokens = (64 << 20, 8) if quick else (BUFFER, 48)
    llms = {
        each.name: LLM(
            str(each.path),
            tokenizer=str(each.tokenizer) if each.tokenizer else None,
            **alone(256, max(ROWS)),
        )
        for each in in_fresh_process(stored_models, quick)
    }
    found: dict[str, list[float]] = {}
    try:
        for number in range(rounds + 1):
            measured = _round(llms, number, tokens, buffer)
            for key, value in measured.items() if number else ():
                found.setdefault(key, []).append(value)
            progress(f"  round {number} of {rounds}")
        sizes = {name: llm.model_info.weight_bytes for name, llm in llms.items()}
    finally:
        for llm in llms.values():
            llm.close()
    return _table(sizes, found, rounds)


def _round(llms: Mapping[str, LLM], number: int, tokens: int, buffer: int) -> dict[str, float]:
    """Bytes per second from memory, and tokens per second by format and number of rows."""
    speeds = {"bandwidth": read_bandwidth(usable_cores(), buffer)}
    order = list(llms.items())
    for name, llm in order[::-1] if number % 2 else order:
        for rows in ROWS:
            ids = fresh_prompts(llm, rows, PROMPT)(number)
            prompts = [{"prompt_token_ids": each} for each in ids]
            outputs = llm.generate(prompts, greedy(tokens), use_tqdm=False)
            speeds[f"{name} {rows}"] = times_of(outputs).rate
    return speeds


def _table(sizes: Mapping[str, int], found: Mapping[str, list[float]], rounds: int) -> Result:
    rows: list[list[Any]] = []
    for name, size in sizes.items():
        one = found[f"{name} 1"]
        limits = [speed / size for speed in found["bandwidth"]]
        share = median(rate / limit for rate, limit in zip(one, limits, strict=True))
        rows.append([name, size / 1e9, median(one), 100 * share, median(found[f"{name} 16"])])
    bandwidth = median(found["bandwidth"]) / 1e9
    return Result(
        f"decoding of Llama-3.2-1B's shape, medians of {rounds} rounds in turn, beside "
        f"{bandwidth:.1f} GB/s read from memory",
        ["", "weights, GB", "1 row, tokens/s", "% of limit", "16 rows, tokens/s"],
        rows,
        dict(found),
        NOTE,
    )
