"""Work for an engine on the tiny checkpoint, and what came of it, to be compared."""

from __future__ import annotations

from typing import Any

from headrace import LLM, SamplingParams
from headrace.contracts.outputs import RequestOutput

PROMPTS: list[list[int]] = [
    [5],
    [7, 8, 9] * 3,
    list(range(40, 97)),
    [7, 8, 9] * 20,
    [7, 8, 9] * 20 + [1, 2],
    list(range(200, 240)),
]

PARAMS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0.0}] * len(PROMPTS),
    "sampled": [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "n": 3},
        {"top_k": 20, "logprobs": 4},
        {"top_p": 0.999, "repetition_penalty": 1.2, "prompt_logprobs": 2},
        {"min_p": 0.05, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logprobs": 0},
        {"temperature": 0.0, "logit_bias": {3: 2.0}, "min_tokens": 5, "logprobs": 1},
    ],
    "preempted": [{"temperature": 0.0, "max_tokens": 40}] * len(PROMPTS),
}
NAMES = tuple(PARAMS)

_OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 48,
    "seed": 0,
    "block_size": 8,
    "num_threads": 1,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {**_OPTIONS, "kv_cache_memory_bytes": 2_000_000},
    "sampled": {**_OPTIONS, "kv_cache_memory_bytes": 2_000_000},
    # Room for the longest sequence and little more.
    "preempted": {**_OPTIONS, "kv_cache_memory_bytes": 130_000, "max_model_len": 128},
}
"""Options of the engine for each kind of work."""


def generate(name: str, llm: LLM, **changes: Any) -> list[RequestOutput]:
    """Run all prompts together; ``changes`` go to all of them."""
    params = [
        SamplingParams(**{"max_tokens": 24, "ignore_eos": True, "seed": 3, **chosen, **changes})
        for chosen in PARAMS[name]
    ]
    outputs = llm.generate([*PROMPTS], params)
    stats = llm.stats()
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    assert stats.prefix_hit_tokens > 0 and stats.pages_used == 0
    assert (stats.preemptions > 0) == (name == "preempted")
    return outputs


def run(name: str, llm: LLM) -> list[Any]:
    """Everything that was generated and reported, in a form that compares exactly."""
    return [
        (
            [(done.token_ids, done.text, done.logprobs) for done in output.outputs],
            output.prompt_logprobs,
        )
        for output in generate(name, llm)
    ]
