"""Headrace against transformers on one checkpoint, the same tokens and the same threads.

Every measurement is made in a fresh process, one resident at a time, the two programs in turn.
Transformers decodes with its own model and cache in a bare loop, and batches with ``generate``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from harness import Result, in_fresh_process, progress
from make_checkpoint import ensure_checkpoint

from headrace.cli.bench.engine import random_prompts
from headrace.ops.host import last_level_cache, usable_cores
from headrace.plan.hardware import read_bandwidth

PROGRAMS = ("headrace", "transformers")
PREFILL, DECODE, BATCH = (512, 1), (128, 33), (128, 64)
"""(tokens in, tokens out) of each measurement."""
ROWS = 16
REPEATS = 3
NAMES = {
    "decode": "decode, batch 1, tok/s",
    "prefill": f"prefill of {PREFILL[0]}, tok/s",
    "batch": f"{ROWS} x ({BATCH[0]} in, {BATCH[1]} out), output tok/s",
}

Generate = Callable[[list[list[int]], int], None]


def load_headrace(model: Path, threads: int) -> Generate:
    """Complete prompts with LLM.generate."""
    from headrace import LLM, SamplingParams

    llm = LLM(str(model), dtype="bfloat16", num_threads=threads, max_model_len=2048)

    def generate(inputs: list[list[int]], count: int) -> None:
        params = SamplingParams(
            max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(inputs, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == count for output in outputs)

    return generate


def load_transformers(model: Path, threads: int) -> Generate:
    """Complete prompts greedily: one in a bare loop, several with ``generate``."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    network.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(inputs: list[list[int]], count: int) -> None:
        tokens = torch.tensor(inputs)
        if len(inputs) > 1:
            mask = torch.ones_like(tokens)
            output = network.generate(
                tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
            )
            assert output.shape[1] == tokens.shape[1] + count
            return
        cache = None
        for _ in range(count):
            output = network(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)

    return generate


def measure_program(program: str, model: Path, threads: int, seed: int) -> dict[str, float]:
    """Tokens per second of one program, the medians of a few requests after a warm-up."""
    load = {"headrace": load_headrace, "transformers": load_transformers}[program]
    generate = load(model, threads)

    def seconds(rows: int, length: int, count: int, key: int) -> float:
        inputs = random_prompts(rows, length, 4000, seed=seed * 1000 + key)
        start = time.perf_counter()
        generate(inputs, count)
        return time.perf_counter() - start

    def typical(rows: int, length: int, count: int, key: int) -> float:
        return median(seconds(rows, length, count, key + i) for i in range(REPEATS))

    seconds(1, *PREFILL, key=0)
    seconds(ROWS, 16, 2, key=1)
    prefill = typical(1, *PREFILL, key=10)
    first = typical(1, DECODE[0], 1, key=20)
    whole = typical(1, *DECODE, key=30)
    batch = seconds(ROWS, *BATCH, key=40)
    return {
        "prefill": PREFILL[0] / prefill,
        "decode": (DECODE[1] - 1) / (whole - first),
        "batch": ROWS * BATCH[1] / batch,
    }


def measure(rounds: int, quick: bool) -> Result:
    """Both programs in turn, ``rounds`` times; medians, ratios, share of the bandwidth."""
    shape, threads = "tiny" if quick else "llama-3.2-1b", usable_cores()
    model = in_fresh_process(ensure_checkpoint, shape)
    samples: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    bandwidths = []
    for number in range(rounds):
        bandwidths.append(read_bandwidth(threads, max(256 << 20, 4 * last_level_cache())))
        for program in PROGRAMS if number % 2 == 0 else reversed(PROGRAMS):
            progress(f"round {number + 1} of {rounds}: {program}")
            sample = in_fresh_process(measure_program, program, model, threads, number)
            samples[program].append(sample)
    bandwidth = median(bandwidths)
    medians = {
        name: [median(sample[key] for sample in samples[program]) for program in PROGRAMS]
        for key, name in NAMES.items()
    }
    weights = (model / "model.safetensors").stat().st_size
    shares = [100 * weights * rate / bandwidth for rate in medians[NAMES["decode"]]]
    medians["decode, % of memory bandwidth"] = shares
    return Result(
        f"{shape} shape, bfloat16, {threads} threads, {bandwidth / 1e9:.1f} GB/s: "
        f"medians of {rounds} rounds",
        ["", *PROGRAMS, "ratio"],
        [[name, *pair, round(pair[0] / pair[1], 2)] for name, pair in medians.items()],
        {"samples": samples, "bandwidth": bandwidth, "model": model.name},
    )
