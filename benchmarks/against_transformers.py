"""Headrace against transformers on one checkpoint, the same tokens and the same threads.

    python benchmarks/against_transformers.py

Every measurement is made in a fresh process, one resident at a time, the two programs in turn.
Transformers decodes with its own model and cache in a bare loop, and batches with ``generate``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from harness import Result, in_fresh_process, parser, progress, prompts
from make_checkpoint import SHAPES, ensure_checkpoint, tensors

from headrace.ops.host import last_level_cache, usable_cores
from headrace.plan.hardware import read_bandwidth

PROGRAMS = ("headrace", "transformers")
PREFILL, DECODE, BATCH = (512, 1), (128, 33), (128, 64)
"""(tokens in, tokens out) of each measurement."""
ROWS = 16
REPEATS = 3

Generate = Callable[[list[list[int]], int], None]


def load_headrace(model: Path, threads: int) -> Generate:
    """Complete prompts with LLM.generate."""
    from headrace import LLM, SamplingParams

    llm = LLM(str(model), dtype="bfloat16", num_threads=threads, max_model_len=2048)

    def generate(inputs: list[list[int]], count: int) -> None:
        params = SamplingParams(
            max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(inputs, params)
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


def measure(program: str, model: Path, threads: int, seed: int) -> dict[str, float]:
    """Tokens per second of one program, the medians of a few requests after a warm-up."""
    generate = {"headrace": load_headrace, "transformers": load_transformers}[program](
        model, threads
    )

    def seconds(rows: int, length: int, count: int, key: int) -> float:
        inputs = prompts(rows, length, seed * 1000 + key)
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


def compare(shape: str, rounds: int, threads: int) -> Result:
    """Both programs in turn, ``rounds`` times; medians, ratios, share of the bandwidth."""
    model = ensure_checkpoint(shape)
    samples: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    bandwidth = []
    for number in range(rounds):
        bandwidth.append(read_bandwidth(threads, max(256 << 20, 4 * last_level_cache())))
        for program in PROGRAMS if number % 2 == 0 else reversed(PROGRAMS):
            progress(f"round {number + 1} of {rounds}: {program}")
            arguments = ("--worker", program, "--shape", shape, "--threads", str(threads))
            sample = in_fresh_process("against_transformers.py", *arguments, "--seed", str(number))
            samples[program].append(sample)
    return tabulate(shape, model, samples, median(bandwidth), threads)


def tabulate(
    shape: str,
    model: Path,
    samples: dict[str, list[dict[str, float]]],
    bandwidth: float,
    threads: int,
) -> Result:
    """The table of medians and ratios."""
    names = {
        "decode": "decode, batch 1, tok/s",
        "prefill": f"prefill of {PREFILL[0]}, tok/s",
        "batch": f"{ROWS} x ({BATCH[0]} in, {BATCH[1]} out), output tok/s",
    }
    rows: list[list[Any]] = []
    for key, name in names.items():
        ours, theirs = (median(sample[key] for sample in samples[p]) for p in PROGRAMS)
        rows.append([name, ours, theirs, round(ours / theirs, 2)])
    weights = sum(
        2 * size[0] * (size[1] if len(size) > 1 else 1) for size in tensors(SHAPES[shape]).values()
    )
    shares = [
        100 * weights * median(sample["decode"] for sample in samples[p]) / bandwidth
        for p in PROGRAMS
    ]
    rows.append(["decode, % of memory bandwidth", *shares, round(shares[0] / shares[1], 2)])
    rounds = len(samples[PROGRAMS[0]])
    return Result(
        f"{shape} shape, bfloat16, {threads} threads, {bandwidth / 1e9:.1f} GB/s: "
        f"medians of {rounds} rounds",
        ["", *PROGRAMS, "ratio"],
        rows,
        {"samples": samples, "bandwidth": bandwidth, "model": model.name},
    )


def main() -> None:
    """Compare, or measure one program as a worker."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    made.add_argument("--threads", type=int, default=usable_cores())
    made.add_argument("--worker", choices=PROGRAMS)
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args()
    if arguments.worker:
        model = ensure_checkpoint(arguments.shape)
        figures = measure(arguments.worker, model, arguments.threads, arguments.seed)
        print(json.dumps(figures))
    else:
        compare(arguments.shape, arguments.rounds, arguments.threads).print(arguments.json)


if __name__ == "__main__":
    main()
