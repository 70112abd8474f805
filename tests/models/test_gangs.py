"""Gangs: what sequences that see each other compute is what a slow loop computes, anyhow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace import LLM, RequestOutput, SamplingParams
from headrace.contracts.method import Property, conflict
from headrace.contracts.outputs import CompletionOutput
from headrace.contracts.profile import Profile
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.methods import make_method
from tests.engine.gang_checks import SeesPrevious
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
    tolerance: float = TOLERANCE,
) -> None:
    """All tokens of a gang were drawn from the logits of the slow loop."""
    assert output.error is None
    count = len(output.outputs)
    headers = [
        llm.tokenizer.encode(header.replace("{number}", str(worker + 1)), False)
        for worker in range(count)
    ]
    tokens = [each.token_ids for each in output.outputs]
    assert len(set(map(tuple, tokens))) == count, "which logits are whose?"
    slow = SharedLayout(expected.model).sampled_logits(output.prompt_token_ids, headers, tokens)
    farthest = 0.0
    for index, should in enumerate(slow):
        found = recorder.logits(output, index)
        assert (found - should).abs().max() < tolerance, f"worker {index}"
        alone = expected.sampled_logits(output, index)
        farthest = max(farthest, (found - alone).abs().max().item())
    assert farthest > max(0.01, 2 * tolerance), "they see nobody"


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


def test_gangs_that_lost_their_pages_go_on(expected: Expected) -> None:
    """Memory for one gang: of two beside plain requests, one is computed again, and the same."""
    prompts = [prompt_of(length) for length in (21, 9, 14, 10)]
    long = (sampled(3, 24, seed=4), sampled(4, 20, seed=5))
    first, second = (replace(each, stop_token_ids=None) for each in long)
    params = [first, greedy(30), second, greedy(25)]
    choices = [choice(), {}, choice(), {}]
    options = {"block_size": BLOCK, "max_num_batched_tokens": 16}
    memory = expected.cache_bytes(160)
    with load(expected.directory, methods=(NAME,), kv_cache_memory_bytes=memory, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, params, methods=choices)
        llm.engine.check_integrity()
        for output in (outputs[0], outputs[2]):
            check_workers(expected, llm, recorder, output)
        assert any(
            output.metrics is not None and output.metrics.num_preemptions > 0
            for output in (outputs[0], outputs[2])
        )
        assert llm.stats().pages_used == 0
    with load(expected.directory, methods=(NAME,), **options) as llm:
        again = llm.generate(prompts, params, methods=choices)
        assert llm.stats().preemptions == 0
    for one, other in zip(outputs, again, strict=True):
        assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]


def test_a_worker_that_has_ended_is_computed_again(expected: Expected) -> None:
    """The gang loses its pages after some of its workers have ended: others still see them."""
    params = sampled(4, 24, seed=3)
    with load(expected.directory, methods=(NAME,), block_size=BLOCK) as llm:
        recorder = LogitsRecorder(llm)
        engine, scheduler = llm.engine, llm.engine.scheduler
        profile = Profile(llm.methods.choose(choice()))
        headers = [llm.tokenizer.encode(f"#{worker}:", False) for worker in range(1, 5)]
        prompt = prompt_of(10)
        engine.add_request("gang", prompt, params, profile=profile, beginnings=headers)
        tokens: list[list[int]] = [[] for _ in headers]
        reasons: dict[int, str] = {}
        preempted = 0
        while engine.has_unfinished_requests:
            for update in engine.step():
                tokens[update.index] += update.token_ids
                if update.finish_reason is not None:
                    reasons[update.index] = update.finish_reason
            engine.check_integrity()
            if len(reasons) > preempted and scheduler.running:
                preempted += 1
                scheduler.preempt(scheduler.running.items[0])
                engine.check_integrity()
        assert preempted > 0 and sorted(reasons) == [0, 1, 2, 3]
        slow = SharedLayout(expected.model).sampled_logits(prompt, headers, tokens)
        for index, should in enumerate(slow):
            outputs = [CompletionOutput(0, "", tokens[index])]
            found = recorder.logits(RequestOutput("gang", None, prompt, outputs))
            assert (found - should).abs().max() < TOLERANCE


def test_a_gang_can_be_given_up(expected: Expected) -> None:
    with load(expected.directory, methods=(NAME,), block_size=BLOCK) as llm:
        for steps in (0, 1, 2, 7):
            profile = Profile(llm.methods.choose(choice()))
            headers = [[1, 2]] * 3
            params = greedy(12, n=3)
            llm.engine.add_request(
                "gang", prompt_of(9), params, profile=profile, beginnings=headers
            )
            for _ in range(steps):
                llm.engine.step()
                llm.engine.check_integrity()
            assert llm.engine.abort_request("gang")
            llm.engine.check_integrity()
            ends = [update.finish_reason for update in llm.engine.step()]
            assert ends.count("abort") == 3
            assert llm.stats().pages_used == llm.stats().running == 0


def test_one_worker_is_the_plain_model(expected: Expected) -> None:
    prompts = [prompt_of(length) for length in (13, 24)]
    with load(expected.directory, methods=(NAME,), block_size=BLOCK) as llm:
        found = llm.generate(prompts, greedy(10, logprobs=0))
    with load(expected.directory, block_size=BLOCK) as llm:
        plain = llm.generate(prompts, greedy(10, logprobs=0))
    assert [o.outputs[0].logprobs for o in found] == [o.outputs[0].logprobs for o in plain]


def test_the_prompt_is_shared_and_blocks_are_not(expected: Expected) -> None:
    prompt = prompt_of(16)
    with load(expected.directory, methods=(NAME,), block_size=BLOCK) as llm:
        params = greedy(12, n=2)
        [first] = llm.generate([prompt], params, methods=choice(""))
        for asked, chosen, cached in (
            (prompt, choice(""), 12),
            (prompt, choice(), 0),
            ([*prompt, *first.outputs[0].token_ids], choice(""), 16),
            (prompt, {}, 0),
        ):
            [output] = llm.generate([asked], params, methods=chosen)
            assert output.metrics is not None
            assert output.metrics.num_cached_tokens == cached


def test_gangs_without_room_are_refused(expected: Expected) -> None:
    options = {"max_num_seqs": 4, "block_size": BLOCK, "max_model_len": 64}
    memory = expected.cache_bytes(64)
    with load(expected.directory, methods=(NAME,), kv_cache_memory_bytes=memory, **options) as llm:
        for prompt, n, most, message in (
            (16, 5, 3, "n: 5 sequences that see each other .* room for 4; .* raise max_num_seqs"),
            (16, 4, 9, "max_tokens: 4 sequences .* room for 9 tokens .* the context holds 64"),
            (17, 4, 6, "max_tokens: 4 sequences .* room for 6 tokens .* the KV cache 16 pages"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                llm.generate([prompt_of(prompt)], greedy(most + 1, n=n), methods=choice())
            if n == 4:
                for params in (greedy(most, n=n), replace(greedy(1, n=n), max_tokens=None)):
                    [output] = llm.generate([prompt_of(prompt)], params, methods=choice())
                    assert [len(each.token_ids) for each in output.outputs] == [most] * n
    with (
        load(expected.directory, methods=(NAME,), max_num_batched_tokens=3) as llm,
        pytest.raises(InvalidRequestError, match="raise max_num_batched_tokens"),
    ):
        llm.generate([prompt_of(4)], greedy(4, n=4))


def test_what_does_not_go_together(expected: Expected) -> None:
    with pytest.raises(ConfigurationError, match="needs that the cache holds every token"):
        load(expected.directory, methods=(NAME,), kv="random-eviction")
    assert conflict([make_method(NAME), SeesPrevious()]) == (
        f"gang-checks needs that {Property.OWN_CONTEXT.value}, which {NAME} breaks"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "needs positions that attention itself turns"),
        ("deepseek_v2", "needs positions that attention itself turns"),
        ("mamba2", "some here have a recurrent state"),
        ("gemma2", "some here have a window"),
    ],
)
def test_models_that_cannot(
    expectations: Callable[[str], Expected], name: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(expectations(name).directory, methods=(NAME,))


def test_gangs_and_taps_combine(expected: Expected, tmp_path: Path) -> None:
    """Heads are moved at the prompt's last token and in all blocks, with and without company."""
    config = expected.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, config.num_attention_heads, width)
    moved = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    save_file({"moved": moved}, tmp_path / "moved.safetensors")
    steering = "inference-time-intervention"
    methods = (NAME, f"{steering}:vectors={tmp_path / 'moved.safetensors'},strength=0.5")
    choices = [{**choice(), steering: {}}, choice()]
    with load(expected.directory, methods=methods, block_size=BLOCK) as llm:
        recorder = LogitsRecorder(llm)
        params = replace(sampled(3, 6), stop_token_ids=None)
        outputs = llm.generate([prompt_of(14), prompt_of(9)], params, methods=choices)
        check_workers(expected, llm, recorder, outputs[1])
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(move_last(0.5 * moved[index]))
            for index, layer in enumerate(expected.model.model.layers)
        ]
        try:
            check_workers(expected, llm, recorder, outputs[0])
        finally:
            for handle in handles:
                handle.remove()


def move_last(direction: Tensor) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
    """A hook that moves what heads say at the last token that is fed."""

    def hook(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        out = arguments[0].clone()
        out[:, -1] += direction.flatten()
        return (out,)

    return hook


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_gangs_in_half_precision(expected: Expected, cache: str) -> None:
    """Of native kernels, which write whatever they read, the segments are left to others."""
    options = {"dtype": "bfloat16", "kv_cache_dtype": cache, "block_size": BLOCK}
    with load(expected.directory, methods=(NAME,), **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate([prompt_of(14), prompt_of(9)], greedy(8, n=3), methods=choice())
        for output in outputs:
            check_workers(expected, llm, recorder, output, tolerance=0.1)
