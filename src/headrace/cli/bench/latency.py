"""``headrace bench latency``: one request at a time."""

from __future__ import annotations

from statistics import median
from typing import Annotated, Any

import typer

from headrace.cli.bench.workload import InputLength, OutputLength, random_prompts
from headrace.cli.options import ENGINE_OF_MODEL, Json, takes
from headrace.cli.output import loading, print_json, print_table, working
from headrace.cli.timing import Timing

COLUMNS = {
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
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Requests to time.")] = 5,
    as_json: Json = False,
) -> None:
    """Time requests that have the engine to themselves, after one that warms it up."""
    from headrace.contracts.sampling import SamplingParams
    from headrace.llm import LLM

    with loading() as progress:
        llm = LLM(**engine, progress=progress)
    params = SamplingParams(
        max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False
    )
    prompts = random_prompts(rounds + 1, input_len, llm.model_info.vocab_size)
    with llm, working("measuring"):
        timings = [Timing.of(llm.generate(prompt, params)[0]) for prompt in prompts][1:]
        name = llm.model_info.name
    medians = {field: median(getattr(t, field) for t in timings) for field in COLUMNS}
    if as_json:
        print_json(
            {
                "model": name,
                "input_len": input_len,
                "output_len": output_len,
                "median": medians,
                "rounds": [timing.as_dict() for timing in timings],
            }
        )
        return
    title = f"{name}: {input_len} tokens in, {output_len} out, one request at a time"
    rows = [(str(i + 1), *_cells(t.as_dict())) for i, t in enumerate(timings)]
    print_table(title, ("round", *COLUMNS.values()), [*rows, ("median", *_cells(medians))])


def _cells(values: dict[str, float]) -> list[float]:
    return [
        values[field] * (1000 if title.endswith("ms") else 1) for field, title in COLUMNS.items()
    ]
