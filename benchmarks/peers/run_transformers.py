"""Drive transformers: one request in a bare loop over its model, several with ``generate``."""

from __future__ import annotations

import time
from typing import Any

from peers.workloads import Job, Loaded, Times, drive


def load(job: Job) -> Loaded:
    """Load a checkpoint in bfloat16."""
    import torch
    import transformers

    torch.set_num_threads(job.threads)
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.bfloat16
    )
    network.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: list[list[int]], count: int) -> Times:
        tokens = torch.tensor(prompts)
        start = time.perf_counter()
        if len(prompts) > 1:
            network.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            last = time.perf_counter() - start
            return Times(last, last)
        cache, first = None, 0.0
        for step in range(count):
            output = network(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
            if step == 0:
                first = time.perf_counter() - start
        return Times(first, time.perf_counter() - start)

    settings = {
        "dtype": "bfloat16",
        "attention": network.config._attn_implementation,
        "threads": job.threads,
        "version": transformers.__version__,
        "torch": torch.__version__,
    }
    return Loaded(generate, settings)


if __name__ == "__main__":
    drive(load)
