"""What a model costs whose weights are three times the memory that it may take.

It decodes, which takes as long as reading the weights does; and it reads prompts in steps that
compute for about as long as they read, where going on with both at once pays most. A disk that
others use is as fast as they let it be: what it gives is measured before and after every round.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

from harness import CACHE, Result, in_fresh_process
from make_checkpoint import ensure_packed

from headrace import LLM, SamplingParams
from headrace.cli.bench.engine import random_prompts
from headrace.disk import DiskFile, aligned_memory
from headrace.weights.streaming import WeightTier

SEQUENCES, PROMPT, TOKENS = 16, 256, 8
STEP_TOKENS, MOST_STEP_TOKENS = 512, 2048
_READ_AT_ONCE = 8 << 20


def disk_bandwidth(directory: Path) -> float:
    """Bytes per second at which the weights are read past the page cache, and nothing else."""
    path = directory / "model.safetensors"
    file, memory, size = DiskFile.open(path, direct=True), aligned_memory(_READ_AT_ONCE), 0
    start = time.perf_counter()
    while size < path.stat().st_size:
        file.read(memory, size, least=min(len(memory), path.stat().st_size - size))
        size += len(memory)
    seconds = time.perf_counter() - start
    file.close()
    return path.stat().st_size / seconds


def memory_of(field: str) -> int:
    """Bytes of this process, as ``/proc/self/status`` has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def timed(llm: LLM, tier: WeightTier, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Steps, seconds of one, and how long it waited for weights."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    steps, waited, start = llm.stats().steps, tier.waited, time.perf_counter()
    llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    steps = llm.stats().steps - steps
    return {
        "steps": steps,
        "seconds": seconds / steps,
        "waited": (tier.waited - waited) / steps,
        "tokens_per_second": sum(len(prompt) - 1 + tokens for prompt in prompts) / seconds,
        "read_per_second": tier.step_bytes * steps / seconds,
    }


def run(directory: Path, cap: int, overlap: bool, step_tokens: int, rounds: int) -> dict[str, Any]:
    """Figures of an engine in this process: ``decode`` and ``prompts``, and bytes at the peak
    beyond those that the interpreter and its libraries had taken before.
    """
    before = memory_of("VmHWM")
    method = f"flexgen:memory={cap},directory={CACHE},overlap={str(overlap).lower()}"
    options: dict[str, Any] = {
        "max_num_seqs": SEQUENCES,
        "max_num_batched_tokens": step_tokens,
        "max_model_len": PROMPT + TOKENS,
        "enable_prefix_caching": False,
    }
    with LLM(str(directory), methods=(method,), **options) as llm:
        tier = next(tier for tier in llm.engine.runner.tiers if isinstance(tier, WeightTier))  # type: ignore[attr-defined]
        timed(llm, tier, [[1]], 2)
        short, long = random_prompts(SEQUENCES, 1, 4000), random_prompts(SEQUENCES, PROMPT, 4000)
        decode = [beside_disk(directory, llm, tier, short, TOKENS) for _ in range(rounds)]
        prompts = [beside_disk(directory, llm, tier, long, 1) for _ in range(rounds)]
    figures = {"decode": _medians(decode), "prompts": _medians(prompts)}
    return {**figures, "peak": memory_of("VmHWM") - before}


def beside_disk(
    directory: Path, llm: LLM, tier: WeightTier, prompts: list[list[int]], tokens: int
) -> dict[str, float]:
    """The same, and what the disk alone gives around that time."""
    before = disk_bandwidth(directory)
    figures = timed(llm, tier, prompts, tokens)
    figures["bandwidth"] = (before + disk_bandwidth(directory)) / 2
    figures["of_disk"] = figures["read_per_second"] / figures["bandwidth"]
    return figures


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(each[key] for each in found) for key in found[0]}


def measure(rounds: int, quick: bool) -> Result:
    """Run with and without overlap, each in a fresh process, in turn."""
    directory = ensure_packed("tiny" if quick else "narrow-1b")
    size = (directory / "model.safetensors").stat().st_size
    # Beside the tiny model, what a step computes with is large.
    cap = size * 5 // 4 if quick else size // 3
    alone = in_fresh_process(run, directory, cap, False, STEP_TOKENS, 1)["prompts"]
    balance = alone["waited"] / max(1e-6, alone["seconds"] - alone["waited"])
    most = STEP_TOKENS if quick else MOST_STEP_TOKENS
    step_tokens = min(max(128, int(STEP_TOKENS * balance) // 128 * 128), most)
    found = {
        overlap: in_fresh_process(run, directory, cap, overlap, step_tokens, rounds)
        for overlap in (True, False)
    }
    bandwidth = found[True]["decode"]["bandwidth"]
    rows = []
    for work, name in (("decode", "decode"), ("prompts", f"prompts, {step_tokens} a step")):
        for overlap in (True, False):
            figures = found[overlap][work]
            rows.append(
                [
                    f"{name}, {'with' if overlap else 'without'} overlap",
                    figures["tokens_per_second"],
                    figures["of_disk"],
                    found[True][work]["tokens_per_second"]
                    / found[False][work]["tokens_per_second"],
                    found[overlap]["peak"] / cap,
                ]
            )
    return Result(
        f"{size / 1e9:.2f} GB of weights in bf16, {cap / 1e9:.2f} GB of memory, {SEQUENCES} "
        f"sequences; the disk alone reads {bandwidth / 1e9:.2f} GB/s; medians of {rounds} rounds",
        ["", "tokens/s", "of the disk's bandwidth", "gain of overlap", "peak memory, of the cap"],
        rows,
        {"cap": cap, "with": found[True], "without": found[False]},
    )
