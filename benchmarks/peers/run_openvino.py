"""Drive OpenVINO GenAI: one request through its pipeline, several through continuous batching."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from peers.workloads import Job, Loaded, Times, drive

CACHE_GIBIBYTES = 2
CHUNK = 2048
"""Prompt tokens in one step."""


def _tokens(ov: Any, prompt: list[int]) -> Any:
    """Ids as the pipelines take them."""
    np: Any = importlib.import_module("numpy")
    return ov.Tensor(np.array([prompt], dtype=np.int64))


def load(job: Job) -> Loaded:
    """Compile the model, or load what was compiled before."""
    ov: Any = importlib.import_module("openvino")
    genai: Any = importlib.import_module("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIBIBYTES
    scheduler.max_num_batched_tokens = job.settings.get("max_num_batched_tokens", CHUNK)
    scheduler.max_num_seqs = job.rows
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "CACHE_DIR": str(Path(job.model) / "compiled"),
    }
    pipeline = genai.ContinuousBatchingPipeline(
        job.model, scheduler_config=scheduler, device="CPU", properties=properties
    )

    def generate(prompts: list[list[int]], count: int) -> Times:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        inputs = [_tokens(ov, prompt) for prompt in prompts]
        start = time.perf_counter()
        outputs = pipeline.generate(inputs, [config] * len(prompts))
        last = time.perf_counter() - start
        assert all(len(output.m_generation_ids[0]) == count for output in outputs)
        metrics = outputs[0].perf_metrics
        decoding = metrics.get_tpot().mean / 1000 * (count - 1) if count > 1 else 0.0
        return Times(last - decoding, last)

    core = ov.Core()
    settings = {
        **properties,
        "CACHE_DIR": "beside the model",
        **{name: getattr(scheduler, name) for name in ("cache_size", "max_num_batched_tokens")},
        "KV_CACHE_PRECISION": str(core.get_property("CPU", "KV_CACHE_PRECISION")),
        "INFERENCE_PRECISION_HINT": str(core.get_property("CPU", "INFERENCE_PRECISION_HINT")),
        "version": genai.__version__,
    }
    return Loaded(generate, settings)


if __name__ == "__main__":
    drive(load)
