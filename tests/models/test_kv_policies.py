"""Eviction is real: logits are those of transformers with the evicted positions masked out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import SamplingParams
from headrace.contracts.kv_policy import SealedPages
from headrace.kv.policies.random_eviction import RandomEviction
from tests.models.expected import (
    TOLERANCE,
    Expected,
    full_prompt_logprobs,
    greedy,
    load,
    prompt_of,
)
from tests.support.checkpoints import VOCAB

LENGTH, CHUNK, BLOCK = 90, 8, 4
KV = "random-eviction:keep=0.5,seed=2"


def visible(length: int, chunk: int) -> Tensor:
    """``[length, length]`` bool: what each token of a text read in chunks may see."""
    policy = RandomEviction(0.5, 2)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start in range(0, length, chunk):
        sealed = start // BLOCK
        [dropped] = policy.drop([SealedPages(list(range(sealed)), sealed)])
        seen = torch.ones(length, dtype=torch.bool)
        for page in dropped:
            seen[page * BLOCK : (page + 1) * BLOCK] = False
        for token in range(start, min(start + chunk, length)):
            mask[token, : token + 1] = seen[: token + 1]
    return mask


def masked_logits(expected: Expected, token_ids: list[int], mask: Tensor) -> Tensor:
    """Logits of transformers where each token sees what ``mask`` says."""
    addend = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        output = expected.model(torch.tensor([token_ids]), attention_mask=addend[None, None])
    logits: Tensor = output.logits[0].float()
    return logits


@pytest.mark.parametrize("options", [{}, {"reference": True}], ids=["fast", "reference"])
def test_logits_without_what_was_evicted(expected: Expected, options: dict[str, Any]) -> None:
    prompt = prompt_of(LENGTH)
    params = SamplingParams(max_tokens=0, prompt_logprobs=VOCAB)
    options = {**options, "block_size": BLOCK, "max_num_batched_tokens": CHUNK, "kv": KV}
    with load(expected.directory, **options) as llm:
        (output,) = llm.generate([prompt], params)
        assert llm.stats().pages_peak <= LENGTH // BLOCK // 2 + CHUNK // BLOCK + 2
    found = full_prompt_logprobs(output)
    mask = visible(LENGTH, CHUNK)
    wanted = torch.log_softmax(masked_logits(expected, prompt, mask), -1)[:-1]
    assert (found - wanted).abs().max() < TOLERANCE
    unmasked = torch.log_softmax(expected.logits(prompt), -1)[:-1]
    assert (found - unmasked).abs().max() > 0.01, "nothing was evicted"


def test_segments_end_chunks(expected: Expected) -> None:
    prompt = prompt_of(40)
    params = SamplingParams(max_tokens=0, prompt_logprobs=VOCAB)
    with load(expected.directory, block_size=BLOCK, kv=KV) as llm:
        parts = {"segments": [prompt[:16], prompt[16:32], prompt[32:]]}
        (output,) = llm.generate([parts], params)
    wanted = torch.log_softmax(masked_logits(expected, prompt, visible(40, 16)), -1)[:-1]
    assert (full_prompt_logprobs(output) - wanted).abs().max() < TOLERANCE


def test_preempted_sequences_go_on(expected: Expected) -> None:
    prompts = [prompt_of(40, seed) for seed in range(4)]
    memory = expected.cache_bytes(120)
    with load(expected.directory, block_size=BLOCK, kv=KV, kv_cache_memory_bytes=memory) as llm:
        outputs = llm.generate(prompts, greedy(40))
        llm.engine.check_integrity()
        assert llm.stats().preemptions > 0
        assert llm.stats().pages_used == 0
    assert [len(output.outputs[0].token_ids) for output in outputs] == [40] * 4


def test_keeping_everything_changes_nothing(expected: Expected) -> None:
    prompts = [prompt_of(40, seed) for seed in range(3)]
    with load(expected.directory, block_size=BLOCK) as llm:
        plain = llm.generate(prompts, greedy(12))
    with load(expected.directory, block_size=BLOCK, kv="random-eviction:keep=1") as llm:
        kept = llm.generate(prompts, greedy(12))
    assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in kept]
