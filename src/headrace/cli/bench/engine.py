"""``headrace bench latency`` and ``throughput``: the engine in this process."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.options import ENGINE_OF_MODEL, Json, takes
from headrace.cli.output import load, progress, report, rows_of
from headrace.cli.timing import timing
from headrace.contracts.outputs import RequestOutput
from headrace.contracts.sampling import SamplingParams

if TYPE_CHECKING:
    from headrace.llm import LLM

FIRST_ID = 300
"""Most vocabularies have their special tokens and single bytes below, and merges from here on."""

COMPUTING = ("forward", "sample")
"""Parts of a step that are the model's work; all others are overhead."""

StepTimes = dict[str, float]
"""Part -> seconds. The engine's own parts, "output" (results put together) and "total"."""

InputLength = Annotated[int, typer.Option("--input-len", min=1, help="Tokens of each prompt.")]
OutputLength = Annotated[
    int, typer.Option("--output-len", min=1, help="Tokens to generate for each prompt.")
]
Rounds = typer.Option("--rounds", min=1, help="Requests to time.")
Requests = typer.Option("--num-prompts", min=1, help="Requests.")
Shared = typer.Option("--shared-prefix-len", min=0, help="Tokens that all prompts share.")

LATENCY_COLUMNS = {
    "time_to_first_token": "first token, ms",
    "time_per_output_token": "per output token, ms",
    "prefill_tokens_per_second": "prefill, tok/s",
    "decode_tokens_per_second": "decode, tok/s",
}


@takes(engine=ENGINE_OF_MODEL)
def latency(
    engine: dict[str, Any],
    input_len: InputLength = 128,
    output_len: OutputLength = 64,
    rounds: Annotated[int, Rounds] = 5,
    as_json: Json = False,
) -> None:
    """Time requests that have the engine to themselves, after one that warms it up."""
    outputs, _, result = measure(engine, rounds, input_len, output_len, at_once=False)
    timings = [timing(output) for output in outputs]
    medians = {name: median(figures[name] for figures in timings) for name in LATENCY_COLUMNS}
    rows = [
        (label, *(figures[name] * (1000 if "time" in name else 1) for name in LATENCY_COLUMNS))
        for label, figures in [*enumerate(timings, 1), ("median", medians)]
    ]
    title = f"{result['model']}: {input_len} tokens in, {output_len} out, one request at a time"
    report(
        {**result, "median": medians, "rounds": timings},
        (title, ("round", *LATENCY_COLUMNS.values()), rows),
        as_json=as_json,
    )


@takes(engine=ENGINE_OF_MODEL)
def throughput(
    engine: dict[str, Any],
    num_prompts: Annotated[int, Requests] = 64,
    input_len: InputLength = 128,
    output_len: OutputLength = 64,
    shared_prefix_len: Annotated[int, Shared] = 0,
    as_json: Json = False,
) -> None:
    """Hand all requests to the engine at once and time the whole."""
    _, steps, result = measure(engine, num_prompts, input_len, output_len, shared_prefix_len)
    parts = {name: 1000 * seconds for name, seconds in median_times(steps).items()}
    report(
        {**result, "median_step_ms": parts},
        (f"throughput of {result['model']}", ("", "value"), rows_of(result)),
        ("a step, medians", ("part", "ms"), rows_of(parts)),
        as_json=as_json,
    )


def measure(
    engine: dict[str, Any],
    requests: int,
    input_len: int,
    output_len: int,
    shared_prefix_len: int = 0,
    *,
    at_once: bool = True,
) -> tuple[list[RequestOutput], list[StepTimes], dict[str, Any]]:
    """Run random requests greedily, all at once or one by one, after one that warms up.

    Returns what they gave, the times of every step, and the figures of the whole.
    """
    from headrace.llm import LLM

    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    with load(LLM, engine) as llm, progress("measuring"):
        first, *prompts = random_prompts(
            requests + 1, input_len, llm.model_info.vocab_size, shared=shared_prefix_len
        )
        run_steps(llm, [first], params)
        before, start = llm.stats(), time.perf_counter()
        batches = [prompts] if at_once else [[prompt] for prompt in prompts]
        runs = [run_steps(llm, batch, params) for batch in batches]
        seconds, after = time.perf_counter() - start, llm.stats()
    outputs = [output for batch_outputs, _ in runs for output in batch_outputs]
    steps = [step for _, batch_steps in runs for step in batch_steps]
    result = {
        "model": llm.model_info.name,
        "input_len": input_len,
        "output_len": output_len,
        "requests": requests,
        "seconds": seconds,
        "requests_per_second": requests / seconds,
        "output_tokens_per_second": requests * output_len / seconds,
        "total_tokens_per_second": requests * (input_len + output_len) / seconds,
        "steps": len(steps),
        "prefix_hit_tokens": after.prefix_hit_tokens - before.prefix_hit_tokens,
        "preemptions": after.preemptions - before.preemptions,
    }
    return outputs, steps, result


def run_steps(
    llm: LLM, prompts: Iterable[list[int]], params: SamplingParams
) -> tuple[list[RequestOutput], list[StepTimes]]:
    """What ``LLM.generate`` does, with a stopwatch: the results, and the times of every step."""
    from headrace.request_output import OutputBuilder

    engine = llm.engine
    builders: dict[str, OutputBuilder] = {}
    pending = deque((f"bench-{index}", prompt) for index, prompt in enumerate(prompts))
    steps: list[StepTimes] = []
    while pending or engine.has_unfinished_requests:
        while pending and not engine.queue_is_full:
            name, prompt = pending.popleft()
            builders[name] = OutputBuilder(name, None, prompt, params, llm.tokenizer.token_text)
            engine.add_request(name, prompt, params)
        start = time.perf_counter()
        updates = engine.step()
        stepped = time.perf_counter()
        for update in updates:
            builders[update.request_id].apply(update)
        end = time.perf_counter()
        steps.append({**engine.timings, "output": end - stepped, "total": end - start})
    return [builder.output for builder in builders.values()], steps


def median_times(steps: Sequence[StepTimes]) -> StepTimes:
    """Part -> median seconds; "overhead" is everything that is not the model's work."""
    parts = {name: median(step[name] for step in steps) for name in steps[0]}
    overhead = median(step["total"] - sum(step[name] for name in COMPUTING) for step in steps)
    return {**parts, "overhead": overhead}


def random_prompts(
    count: int, length: int, vocab_size: int, *, shared: int = 0, seed: int = 0
) -> list[list[int]]:
    """``count`` prompts of ``length`` token ids, the first ``shared`` of them the same in all."""
    rng = random.Random(seed)
    ids = range(min(FIRST_ID, vocab_size // 2), vocab_size)
    prefix = rng.choices(ids, k=min(shared, length))
    return [prefix + rng.choices(ids, k=length - len(prefix)) for _ in range(count)]
