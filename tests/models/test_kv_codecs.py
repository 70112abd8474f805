"""Coded KV is what is attended to: logits are those of transformers on a cache so changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from headrace import SamplingParams
from headrace.contracts.kv_codec import KVCodec
from headrace.errors import ConfigurationError
from headrace.kv.codecs.gear import Gear
from headrace.kv.codecs.kivi import Kivi
from tests.models.expected import (
    Expected,
    full_prompt_logprobs,
    greedy,
    load,
    prompt_of,
)
from tests.support.checkpoints import VOCAB
from tests.support.logits import LogitsRecorder

BLOCK, UNIT = 4, 16
TOLERANCE = 1e-3
"""Of logits: an entry halfway between two levels may be rounded to either."""
GEAR = "gear:bits=4,unit=16,outliers=0.2"
CODECS: dict[str, KVCodec] = {
    GEAR: Gear(bits=4, unit=16, outliers=0.2),
    "kivi:bits=2,group=8,unit=16": Kivi(bits=2, group=8, unit=16),
}


@pytest.fixture(params=("llama3", "qwen3"))
def expected(request: pytest.FixtureRequest, expectations: Callable[[str], Expected]) -> Expected:
    """Two configurations, of which one has heads of 24."""
    return expectations(request.param)


def coded_logits(expected: Expected, tokens: list[int], codec: KVCodec) -> Tensor:
    """``[T, vocab]``: unit after unit, each over a cache in which those before it are coded."""
    cache = transformers.DynamicCache(config=expected.model.config)
    found = []
    with torch.inference_mode():
        for start in range(0, len(tokens), UNIT):
            ids = torch.tensor([tokens[start : start + UNIT]])
            found.append(expected.model(ids, past_key_values=cache).logits[0].float())
            if ids.shape[1] < UNIT:
                break
            for layer in cache.layers:
                unit = (layer.keys[0, :, start:], layer.values[0, :, start:])
                parts = {name: part[None] for name, part in codec.encode(*unit).items()}
                for tensor, near in zip(
                    (layer.keys, layer.values), codec.decode(parts), strict=True
                ):
                    tensor[0, :, start:] = near[0]
    return torch.cat(found)


@pytest.mark.parametrize("kv", CODECS)
@pytest.mark.parametrize(
    "options",
    [{}, {"reference": True}, {"max_num_batched_tokens": 7}],
    ids=["fast", "reference", "chunks"],
)
def test_logits_on_a_coded_cache(expected: Expected, options: dict[str, Any], kv: str) -> None:
    prompt = prompt_of(61)
    params = SamplingParams(max_tokens=0, prompt_logprobs=VOCAB)
    with load(expected.directory, **options, block_size=BLOCK, kv=kv) as llm:
        [output] = llm.generate([prompt], params)
        assert llm.stats().pages_peak < 61 // BLOCK
    found = full_prompt_logprobs(output)
    wanted = torch.log_softmax(coded_logits(expected, prompt, CODECS[kv]), -1)[:-1]
    assert (found - wanted).abs().max() < TOLERANCE
    plain = torch.log_softmax(expected.logits(prompt), -1)[:-1]
    assert (found[UNIT:] - plain[UNIT:]).abs().max() > 10 * TOLERANCE
    assert (found[:UNIT] - plain[:UNIT]).abs().max() < TOLERANCE


def test_generation_beside_plain_requests(expected: Expected) -> None:
    """Prompts, generation, forks and plain rows share steps."""
    prompts = [prompt_of(length) for length in (9, 22, 40, 15)]
    choices: list[Any] = [None, {}, None, None]
    params = [greedy(30), greedy(30), greedy(30), greedy(20, n=2)]
    options: dict[str, Any] = {"block_size": BLOCK, "max_num_batched_tokens": 16}
    with load(expected.directory, kv=GEAR, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, params, methods=choices)
        llm.engine.check_integrity()
    for output, choice in zip(outputs, choices, strict=True):
        for index, completion in enumerate(output.outputs):
            tokens = [*output.prompt_token_ids, *completion.token_ids]
            if choice is None:
                logits = coded_logits(expected, tokens, CODECS[GEAR])
            else:
                logits = expected.logits(tokens)
            wanted = logits[len(output.prompt_token_ids) - 1 : -1]
            assert (recorder.logits(output, index) - wanted).abs().max() < TOLERANCE


def test_units_are_shared(expected: Expected) -> None:
    prompt = prompt_of(50)
    with load(expected.directory, block_size=BLOCK, kv=GEAR) as llm:
        outputs = [
            llm.generate([tokens], greedy(6, logprobs=0), methods=choice)[0]
            for tokens, choice in (
                (prompt, None),
                ([*prompt, *prompt_of(7)], None),
                (prompt, None),
                (prompt, {}),
            )
        ]
        llm.engine.check_integrity()
    cached = [output.metrics.num_cached_tokens for output in outputs if output.metrics]
    assert cached == [0, 48, 48, 0]
    for output in outputs[:3]:
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        wanted = torch.log_softmax(coded_logits(expected, tokens, CODECS[GEAR]), -1)
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        for place, entry in enumerate(logprobs, len(output.prompt_token_ids) - 1):
            [(token, found)] = entry.items()
            assert abs(found.logprob - wanted[place, token]) < TOLERANCE


def test_preempted_sequences_come_out_the_same(expected: Expected) -> None:
    prompts = [prompt_of(40, seed) for seed in range(4)]
    with load(expected.directory, block_size=BLOCK, kv=GEAR) as llm:
        alone = [llm.generate([prompt], greedy(30))[0] for prompt in prompts]
    memory = expected.cache_bytes(100)
    with load(expected.directory, block_size=BLOCK, kv=GEAR, kv_cache_memory_bytes=memory) as llm:
        together = llm.generate(prompts, greedy(30))
        assert llm.stats().preemptions > 0
        assert llm.stats().pages_used == 0
        llm.engine.check_integrity()
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "gear:bits=3"}, "bits must be 2, 4 or 8, got 3"),
        ({"kv": "gear:bits=8,unit=8,rank=16"}, "gear: 8 tokens take .* make units longer"),
        ({"kv": GEAR, "kv_cache_dtype": "int8"}, "gear: needs layers that keep plain keys"),
        ({"kv": GEAR, "methods": ("h2o",)}, "h2o needs that cached keys .* which gear breaks"),
    ],
)
def test_what_does_not_go(expected: Expected, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(expected.directory, block_size=BLOCK, **options)
