"""Gangs: what sequences that see each other compute is what a slow loop computes, anyhow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from headrace import LLM, RequestOutput, SamplingParams
from headrace.errors import ConfigurationError, InvalidRequestError
from tests.models.expected import TOLERANCE, Expected, greedy, load, prompt_of
from tests.models.shared_layout import SharedLayout
from tests.support.checkpoints import VOCAB
from tests.support.logits import LogitsRecorder

NAME = "hogwild-inference"
HEADER = "#{number}:"
BLOCK = 4


@pytest.fixture(params=("llama3", "qwen3"))
def expected(request: pytest.FixtureRequest, expectations: Callable[[str], Expected]) -> Expected:
    """Two configurations, of which one has head norms."""
    return expectations(request.param)


def choice(header: str = HEADER) -> dict[str, dict[str, Any]]:
    return {NAME: {"header": header}}


def sampled(n: int, max_tokens: int, seed: int = 0, **options: Any) -> SamplingParams:
    """Workers end at different tokens, one in ten of which ends them."""
    stops = list(range(0, VOCAB, 10))
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        seed=seed,
        ignore_eos=True,
        stop_token_ids=stops,
        detokenize=False,
        **options,
    )


def check_workers(
    expected: Expected,
    llm: LLM,
    recorder: LogitsRecorder,
    output: RequestOutput,
    header: str = HEADER,
) -> None:
    """All tokens of a gang were drawn from the logits of the slow loop."""
    assert output.error is None
    count = len(output.outputs)
    headers = [
        llm.tokenizer.encode(header.replace("{number}", str(worker + 1)), False)
        for worker in range(count)
    ]
    tokens = [each.token_ids for each in output.outputs]
    slow = SharedLayout(expected.model).sampled_logits(output.prompt_token_ids, headers, tokens)
    for index, should in enumerate(slow):
        found = recorder.logits(output, index)
        assert (found - should).abs().max() < TOLERANCE, f"worker {index}"
        if max(map(len, tokens)) > 3:
            alone = expected.sampled_logits(output, index)
            far = (found - alone).abs().max() > 0.01
            assert far or len(tokens[index]) < 2, "it sees nobody"


@pytest.mark.parametrize("options", [{}, {"reference": True}], ids=["fast", "reference"])
def test_workers_see_each_other(expected: Expected, options: dict[str, Any]) -> None:
    """Gangs and plain requests share steps; prompts come in chunks, workers end when they will."""
    options = {**options, "max_num_batched_tokens": 11, "block_size": BLOCK}
    prompts = [prompt_of(length) for length in (23, 30, 8, 17, 5)]
    params = [
        sampled(4, 14),
        greedy(12, n=2),
        greedy(20),
        sampled(3, 9, seed=1),
        sampled(2, 12, seed=2),
    ]
    choices = [choice(), {}, {}, choice(""), choice()]
    with load(expected.directory, methods=(NAME,), **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, params, methods=choices)
        llm.engine.check_integrity()
        check_workers(expected, llm, recorder, outputs[0])
        check_workers(expected, llm, recorder, outputs[3], "")
        check_workers(expected, llm, recorder, outputs[4])
    lengths = {len(each.token_ids) for each in outputs[0].outputs}
    assert len(lengths) > 1, "all workers end at once"
    for output in outputs[1:3]:
        for index in range(len(output.outputs)):
            should = expected.sampled_logits(output, index)
            assert (recorder.logits(output, index) - should).abs().max() < TOLERANCE
    steps = [len(step) for step in recorder.steps]
    assert max(steps) >= 6, "the requests did not share steps"
