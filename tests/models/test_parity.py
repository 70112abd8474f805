"""Logits equal those of transformers in fp32, whatever the engine does with batches and pages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace import SamplingParams
from tests.models.expected import (
    TOLERANCE,
    Expected,
    difference,
    full_prompt_logprobs,
    greedy,
    load,
    prompt_of,
)
from tests.support.checkpoints import (
    LLAMA3_ROPE,
    VOCAB,
    copy_checkpoint,
    edit_config,
    to_old_style,
)
from tests.support.logits import LogitsRecorder


@pytest.fixture(params=[False, True], ids=["fast", "reference"])
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of the fast path, and of reference mode."""
    return {"reference": request.param}


def test_prefill_and_decode(expected: Expected, mode: dict[str, Any]) -> None:
    with load(expected.directory, **mode) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(90)], greedy(12))
    assert [[row.inputs for row in step] for step in recorder.steps] == [[90]] + [[1]] * 11
    assert recorder.logits(output).argmax(-1).tolist() == output.outputs[0].token_ids
    assert difference(expected, recorder, output) < TOLERANCE


def test_ragged_batch_of_chunks_and_decodes(expected: Expected, mode: dict[str, Any]) -> None:
    prompts = [prompt_of(length) for length in (1, 3, 70, 17, 40, 9, 26)]
    with load(expected.directory, max_num_batched_tokens=24, block_size=4, **mode) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, [greedy(6 + 2 * i) for i in range(len(prompts))])
    mixed = [
        step
        for step in recorder.steps
        if any(row.is_decode for row in step)
        and any(row.is_chunk for row in step)
        and any(row.past == 0 and row.inputs > 1 for row in step)
    ]
    assert mixed, "no step held decodes, the rest of one prompt and the start of another"
    assert max(len({row.past for row in step if row.is_decode}) for step in recorder.steps) > 3
    for output in outputs:
        assert difference(expected, recorder, output) < TOLERANCE


def test_chunks_that_end_inside_pages(expected: Expected, mode: dict[str, Any]) -> None:
    with load(expected.directory, max_num_batched_tokens=7, block_size=4, **mode) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(80)], greedy(3))
    pasts = [row.past for (row,) in recorder.steps[:12]]
    assert pasts == list(range(0, 84, 7))
    assert difference(expected, recorder, output) < TOLERANCE


def test_prefix_hit(expected: Expected, mode: dict[str, Any]) -> None:
    prefix = prompt_of(50)
    with load(expected.directory, block_size=8, **mode) as llm:
        recorder = LogitsRecorder(llm)
        llm.generate([prefix], greedy(1))
        outputs = llm.generate([prefix + prompt_of(n) for n in (1, 30)] + [prefix], greedy(5))
    for output in outputs:
        assert output.metrics is not None and output.metrics.num_cached_tokens == 48
        assert difference(expected, recorder, output) < TOLERANCE


def test_preemption(expected: Expected, mode: dict[str, Any]) -> None:
    prompts = [prompt_of(12, seed) for seed in range(4)]
    memory = expected.cache_bytes(96)
    with load(expected.directory, kv_cache_memory_bytes=memory, block_size=4, **mode) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(40))
        assert llm.stats().preemptions > 0
        assert llm.stats().pages_used == 0
    assert any(output.metrics and output.metrics.num_preemptions for output in outputs)
    for output in outputs:
        assert difference(expected, recorder, output) < TOLERANCE


def test_completions_that_share_a_partly_filled_page(
    expected: Expected, mode: dict[str, Any]
) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True)
    with load(expected.directory, block_size=8, **mode) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(29)], params)
    assert [row.samples for row in recorder.steps[0]] == [3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    assert difference(expected, recorder, output) < TOLERANCE


def test_prompt_logprobs(expected: Expected, mode: dict[str, Any]) -> None:
    prompts = [prompt_of(75), prompt_of(2), prompt_of(33)]
    with load(expected.directory, max_num_batched_tokens=20, block_size=4, **mode) as llm:
        outputs = llm.generate(prompts, greedy(2, prompt_logprobs=VOCAB))
    for output in outputs:
        logits = expected.logits(output.prompt_token_ids)[:-1]
        actual = full_prompt_logprobs(output)
        assert (actual - torch.log_softmax(logits, -1)).abs().max() < TOLERANCE


def test_sampled_logprobs(expected: Expected, mode: dict[str, Any]) -> None:
    with load(expected.directory, **mode) as llm:
        (output,) = llm.generate([prompt_of(20)], greedy(3, logprobs=VOCAB))
    wanted = torch.log_softmax(expected.sampled_logits(output), -1)
    entries = output.outputs[0].logprobs
    assert entries is not None
    actual = torch.tensor([[entry[token].logprob for token in range(VOCAB)] for entry in entries])
    assert (actual - wanted).abs().max() < TOLERANCE


def logits_of(directory: Path) -> torch.Tensor:
    """``[tokens, vocab]`` of a long prompt and a few decodes."""
    with load(directory) as llm:
        recorder = LogitsRecorder(llm)
        return recorder.logits(llm.generate([prompt_of(100)], greedy(4))[0])


def test_old_and_new_configuration_agree(expected: Expected, tmp_path: Path) -> None:
    old = to_old_style(copy_checkpoint(expected.directory, tmp_path / "old"))
    understood = transformers.AutoConfig.from_pretrained(old).rope_parameters
    assert understood.items() >= expected.model.config.rope_parameters.items()
    assert torch.equal(logits_of(old), logits_of(expected.directory))


def test_old_scaling_counts_beside_new_parameters(
    expectations: Callable[[str], Expected], tmp_path: Path
) -> None:
    """As when ``rope_scaling`` was written into a file by hand, to stretch the context."""
    expected = expectations("llama3")
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    both = edit_config(
        copy_checkpoint(expected.directory, tmp_path / "both"),
        rope_parameters={"rope_type": "default", "rope_theta": LLAMA3_ROPE["rope_theta"]},
        rope_scaling=scaling,
    )
    assert torch.equal(logits_of(both), logits_of(expected.directory))


def test_bfloat16(expected: Expected) -> None:
    """As near to fp32 as transformers is in bf16, and near to transformers.

    Errors are root mean squares over all positions of a prompt and the whole vocabulary, relative
    to the spread of the logits: bf16 has 8 bits, and rounds a few dozen times on the way.
    """
    prompt = prompt_of(120)
    with load(expected.directory, dtype="bfloat16") as llm:
        (output,) = llm.generate([prompt], greedy(1, prompt_logprobs=VOCAB))
    actual = full_prompt_logprobs(output)
    exact = torch.log_softmax(expected.logits(prompt)[:-1], -1)
    half = Expected(copy.deepcopy(expected.model).to(torch.bfloat16), expected.directory)
    theirs = torch.log_softmax(half.logits(prompt)[:-1], -1)

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).square().mean().sqrt() / exact.std()).item()

    assert 0 < error(actual, exact) < 1.2 * error(theirs, exact)
    assert error(actual, theirs) < 0.03


def test_float16(expectations: Callable[[str], Expected]) -> None:
    expected, prompt = expectations("llama3"), prompt_of(60)
    with load(expected.directory, dtype="float16") as llm:
        (output,) = llm.generate([prompt], greedy(1, prompt_logprobs=VOCAB))
    wanted = torch.log_softmax(expected.logits(prompt)[:-1], -1)
    assert 0 < (full_prompt_logprobs(output) - wanted).abs().max() < 0.05
