"""Drive llama.cpp: greedy decoding over its C interface, prompts in batches, flash attention."""

from __future__ import annotations

import time

import numpy as np

from peers.llama_library import BATCH, MICRO_BATCH, Array, Model, llama, load_backend
from peers.workloads import Job, Loaded, Times, drive


def load(job: Job) -> Loaded:
    """Load a GGUF file."""
    load_backend(job.settings["backend"])
    kv_type = job.settings.get("kv_type", "f16")
    model = Model(job.model, job.threads, job.rows, job.context, kv_type)

    def greedy(logits: Array) -> int:
        return int(np.argmax(logits))

    def generate(prompts: list[list[int]], count: int) -> Times:
        start = time.perf_counter()
        model.clear()
        entries = [
            (token, position, row, position == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        tokens = model.feed(entries, greedy)
        first = time.perf_counter() - start
        length = len(prompts[0])
        for step in range(count - 1):
            entries = [(token, length + step, row, True) for row, token in enumerate(tokens)]
            tokens = model.feed(entries, greedy)
        return Times(first, time.perf_counter() - start)

    settings = {
        "backend": f"ggml-cpu-{job.settings['backend']}",
        "system": llama.llama_print_system_info().decode().strip(),
        "threads": job.threads,
        "n_batch": BATCH,
        "n_ubatch": MICRO_BATCH,
        "flash_attn": "on",
        "kv_type": kv_type,
        "repack": True,
        "version": llama.__version__,
    }
    return Loaded(generate, settings)


if __name__ == "__main__":
    drive(load)
