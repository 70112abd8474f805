"""``headrace bench throughput``: many requests at once."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from headrace.cli.bench.steps import median_times, run_steps
from headrace.cli.bench.workload import InputLength, OutputLength, random_prompts
from headrace.cli.options import ENGINE_OF_MODEL, Json, takes
from headrace.cli.output import loading, print_json, print_table, working


@takes(engine=ENGINE_OF_MODEL)
def throughput(
    engine: dict[str, Any],
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Requests.")] = 64,
    input_len: InputLength = 128,
    output_len: OutputLength = 64,
    shared_prefix_len: Annotated[
        int, typer.Option("--shared-prefix-len", min=0, help="Tokens that all prompts share.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Hand all requests to the engine at once and time the whole."""
    from headrace.contracts.sampling import SamplingParams
    from headrace.llm import LLM

    with loading() as progress:
        llm = LLM(**engine, progress=progress)
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    prompts = random_prompts(
        num_prompts + 1, input_len, llm.model_info.vocab_size, shared=shared_prefix_len
    )
    with llm, working("measuring"):
        llm.generate(prompts[0], params)
        before = llm.stats()
        start = time.perf_counter()
        outputs, steps = run_steps(llm, prompts[1:], params)
        seconds = time.perf_counter() - start
        after = llm.stats()
        name = llm.model_info.name
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    result = {
        "requests": num_prompts,
        "seconds": seconds,
        "requests_per_second": num_prompts / seconds,
        "output_tokens_per_second": generated / seconds,
        "total_tokens_per_second": (generated + num_prompts * input_len) / seconds,
        "steps": len(steps),
        "prefix_hit_tokens": after.prefix_hit_tokens - before.prefix_hit_tokens,
        "preemptions": after.preemptions - before.preemptions,
    }
    parts = {name: 1000 * seconds for name, seconds in median_times(steps).items()}
    if as_json:
        lengths = {"input_len": input_len, "output_len": output_len}
        print_json({"model": name, **lengths, **result, "median_step_ms": parts})
        return
    title = f"{name}: {num_prompts} requests, {input_len} tokens in, {output_len} out"
    print_table(title, ("", "value"), [(k.replace("_", " "), v) for k, v in result.items()])
    print_table("a step, medians", ("part", "ms"), list(parts.items()))
