"""Drive vLLM's processor back end through its Python face."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import Any

from peers.workloads import Job, Loaded, Times, drive, peak_memory, read_job

KV_GIBIBYTES = "1"
LEAST_CHUNK, LARGEST_CHUNK = 512, 4096
"""Prompt tokens in one step. It tries a step of that size when it starts, which takes its time."""


def load(job: Job) -> Loaded:
    """Start the engine, which runs in a process of its own."""
    vllm: Any = importlib.import_module("vllm")
    largest = max(shape.rows * shape.prompt for shape in job.shapes)
    options = {
        "dtype": "bfloat16",
        "max_model_len": job.context,
        "max_num_seqs": job.rows,
        "max_num_batched_tokens": min(LARGEST_CHUNK, max(LEAST_CHUNK, largest)),
        "enable_prefix_caching": False,
        **job.settings,
    }
    llm = vllm.LLM(job.model, disable_log_stats=False, **options)

    def generate(prompts: list[list[int]], count: int) -> Times:
        parameters = vllm.SamplingParams(
            max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = llm.generate(requests, parameters, use_tqdm=False)
        last = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == count for output in outputs)
        metrics = outputs[0].metrics
        return Times(last - (metrics.last_token_ts - metrics.first_token_ts), last)

    variables = {name: os.environ[name] for name in os.environ if name.startswith("VLLM_CPU")}
    platform = type(importlib.import_module("vllm.platforms").current_platform).__name__
    preloaded = [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    settings = {
        **options,
        **variables,
        "preloaded": " ".join(dict.fromkeys(preloaded)),
        "platform": platform,
        "version": vllm.__version__,
    }
    return Loaded(generate, settings, peak_memory_elsewhere=_largest_child)


def _largest_child() -> int:
    """Peak memory of the engine's workers."""
    psutil: Any = importlib.import_module("psutil")
    children = psutil.Process().children(recursive=True)
    return max((peak_memory(child.pid) for child in children), default=0)


if __name__ == "__main__":
    cores = sorted(os.sched_getaffinity(0))[: read_job().threads]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": KV_GIBIBYTES,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    drive(load)
