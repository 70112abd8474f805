"""Reference mode: tokens and logits are the same, bit for bit, whatever shares the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import SamplingParams
from tests.models.expected import Expected, full_prompt_logprobs, greedy, load, prompt_of
from tests.support.checkpoints import VOCAB
from tests.support.logits import LogitsRecorder

SHARED = prompt_of(19)
PROMPTS = [prompt_of(1), prompt_of(33), SHARED + prompt_of(6), prompt_of(12), SHARED + prompt_of(2)]
GREEDY = greedy(14)
SEEDED = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=14, ignore_eos=True)

Results = list[tuple[list[int], Tensor]]


@pytest.fixture(scope="module")
def alone(expectations: Callable[[str], Expected]) -> Callable[[str, SamplingParams], Results]:
    """Results of each prompt in an engine of its own, made once for each model and sampling."""
    made: dict[tuple[str, str], Results] = {}

    def results(name: str, params: SamplingParams) -> Results:
        key = name, repr(params)
        if key not in made:
            directory = expectations(name).directory
            made[key] = []
            for prompt in PROMPTS:
                with load(directory, reference=True, enable_prefix_caching=False) as llm:
                    recorder = LogitsRecorder(llm)
                    (output,) = llm.generate([prompt], params)
                made[key].append((output.outputs[0].token_ids, recorder.logits(output)))
        return made[key]

    return results


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
@pytest.mark.parametrize(
    ("options", "slots"),
    [
        pytest.param({"max_num_batched_tokens": 512}, None, id="one batch"),
        pytest.param({"max_num_batched_tokens": 5, "block_size": 4}, None, id="chunks"),
        pytest.param({"max_num_batched_tokens": 9, "max_num_seqs": 2}, None, id="two rows"),
        pytest.param({"block_size": 4}, 56, id="preemption"),
    ],
)
def test_batches_chunks_and_preemption_change_nothing(
    options: dict[str, Any],
    slots: int | None,
    name: str,
    params: SamplingParams,
    expectations: Callable[[str], Expected],
    alone: Callable[[str, SamplingParams], Results],
) -> None:
    expected = expectations(name)
    if slots:
        options = {**options, "kv_cache_memory_bytes": expected.cache_bytes(slots)}
    with load(expected.directory, reference=True, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(PROMPTS, params)
        assert (llm.stats().preemptions > 0) == (slots is not None)
    for output, (tokens, logits) in zip(outputs, alone(name, params), strict=True):
        assert output.outputs[0].token_ids == tokens
        assert torch.equal(recorder.logits(output), logits)


@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
def test_prefix_hits_change_nothing(
    name: str,
    expectations: Callable[[str], Expected],
    alone: Callable[[str, SamplingParams], Results],
) -> None:
    with load(expectations(name).directory, reference=True, block_size=4) as llm:
        recorder = LogitsRecorder(llm)
        for _ in range(2):
            outputs = llm.generate(PROMPTS, GREEDY)
            for output, (tokens, logits) in zip(outputs, alone(name, GREEDY), strict=True):
                assert output.outputs[0].token_ids == tokens
                assert torch.equal(recorder.logits(output), logits)
    cached = [output.metrics and output.metrics.num_cached_tokens for output in outputs]
    assert cached == [(len(prompt) - 1) // 4 * 4 for prompt in PROMPTS]


def test_neighbours_of_another_kind_change_nothing(
    expectations: Callable[[str], Expected],
    alone: Callable[[str, SamplingParams], Results],
) -> None:
    """Forks, penalties and prompt log-probabilities in the same steps."""
    others = [
        SamplingParams(n=3, temperature=2.0, max_tokens=20, ignore_eos=True),
        SamplingParams(repetition_penalty=1.5, logit_bias={7: 5.0}, max_tokens=9),
        SamplingParams(prompt_logprobs=3, logprobs=2, max_tokens=4),
    ]
    prompts = [prompt_of(20, 1), prompt_of(31, 1), prompt_of(45, 1), *PROMPTS]
    params = [*others, *[GREEDY] * len(PROMPTS)]
    with load(expectations("llama3").directory, reference=True, max_num_batched_tokens=16) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, params)[len(others) :]
    for output, (tokens, logits) in zip(outputs, alone("llama3", GREEDY), strict=True):
        assert output.outputs[0].token_ids == tokens
        assert torch.equal(recorder.logits(output), logits)


def test_prompt_logprobs_depend_on_nothing_else(
    expectations: Callable[[str], Expected],
) -> None:
    params = greedy(1, prompt_logprobs=VOCAB)
    prompts = PROMPTS[1:]
    found = []
    for options in ({}, {"max_num_batched_tokens": 7, "block_size": 4}):
        with load(expectations("llama3").directory, reference=True, **options) as llm:
            outputs = llm.generate(prompts, params)
        found.append([full_prompt_logprobs(output) for output in outputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
