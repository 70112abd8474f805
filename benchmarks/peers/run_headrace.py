"""Drive headrace through its Python face."""

from __future__ import annotations

import time

from peers.workloads import Job, Loaded, Times, drive


def load(job: Job) -> Loaded:
    """Load a checkpoint; the settings are options of ``LLM``."""
    import headrace
    from headrace import LLM, SamplingParams

    options = {
        "num_threads": job.threads,
        "max_model_len": job.context,
        **job.settings,
    }
    llm = LLM(job.model, **options)

    def generate(prompts: list[list[int]], count: int) -> Times:
        parameters = SamplingParams(
            max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        last = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == count for output in outputs)
        metrics = outputs[0].metrics
        assert metrics is not None and metrics.finished_time and metrics.first_token_time
        return Times(last - (metrics.finished_time - metrics.first_token_time), last)

    info = llm.model_info
    facts = {
        "weight_bytes": info.weight_bytes,
        "kv_token_bytes": info.kv_token_bytes,
        "kv_bytes": info.num_pages * info.block_size * info.kv_token_bytes,
    }
    settings = {**options, "dtype": info.dtype, "version": headrace.__version__}
    return Loaded(generate, settings, facts)


if __name__ == "__main__":
    drive(load)
