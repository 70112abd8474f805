"""The same engine on CUDA. Without a CUDA device these tests fail: they are asked for by mark.

A checkout with torch, numpy, safetensors, tokenizers, jinja2 and pytest is enough:
``PYTHONPATH=src python -m pytest -m gpu``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import LLM, SamplingParams
from headrace.contracts.outputs import CompletionOutput
from headrace.errors import ConfigurationError
from headrace.exec.sampling.sampler import Sampler
from headrace.ops.device import resolve_device
from headrace.ops.table import VERSIONS
from tests.exec.builders import make_bench, plan_row
from tests.exec.plain_sampling import make_state
from tests.gpu import workload
from tests.gpu.checkpoint import VOCAB, write_checkpoint
from tests.ops.attention_cases import CASES as ATTENTION_CASES
from tests.ops.attention_cases import AttentionCase
from tests.ops.function_cases import FUNCTION_CASES, TOLERANCES

DEVICE = "cuda"
NEAR_TIE = 1e-3
"""A difference of log-probabilities that rounding on another device may turn around."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def to_device(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("operation", FUNCTION_CASES)
def test_functions_agree_with_the_cpu(operation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    reference = VERSIONS[operation]["reference"]
    for arguments in FUNCTION_CASES[operation](dtype):
        found = reference(*map(to_device, arguments))
        assert isinstance(found, torch.Tensor) and found.device.type == DEVICE
        torch.testing.assert_close(found.cpu(), reference(*arguments), **TOLERANCES[dtype])


@pytest.mark.parametrize("version", ["reference", "matmul"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_agrees_with_the_cpu(case: AttentionCase, version: str) -> None:
    found = case.run(VERSIONS["attention"][version], DEVICE)
    expected = case.run(VERSIONS["attention"]["reference"])
    found.assert_close(expected, TOLERANCES[case.dtype], 1e-4)


@pytest.mark.parametrize(
    ("dtype", "reference", "tolerance"),
    [("float32", False, 1e-3), ("float32", True, 1e-3), ("bfloat16", False, 1.0)],
)
def test_logits_are_the_cpus(
    checkpoint: Path, dtype: str, reference: bool, tolerance: float
) -> None:
    """In a step of all kinds of rows, after one that fed their pasts; they are about 3 large."""
    ids = torch.randint(0, VOCAB, (4, 30), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for device, kind in ((DEVICE, dtype), ("cpu", "float32")):
        bench = make_bench(checkpoint, reference=reference, dtype=kind, device=device)
        for row in range(4):
            bench.deal(row, 30)
        bench.step(plan_row(0, ids[0][:9], samples=()), plan_row(1, ids[1][:29], samples=()))
        _, logits = bench.step(
            plan_row(0, ids[0][9:], slot=9),
            plan_row(1, ids[1][29:], slot=29),
            plan_row(2, ids[2]),
            plan_row(3, ids[3][:1]),
        )
        found.append(torch.stack(logits).float().cpu())
    torch.testing.assert_close(*found, rtol=0, atol=tolerance)


def make_llm(checkpoint: Path, name: str, device: str, **options: Any) -> LLM:
    options = {"dtype": "float32", **workload.OPTIONS[name], **options}
    return LLM(str(checkpoint), device=device, **options)


def assert_same_choices(found: CompletionOutput, expected: CompletionOutput) -> None:
    """Equal tokens, but for what follows a near tie."""
    assert expected.logprobs is not None
    for ours, theirs, logprobs in zip(
        found.token_ids, expected.token_ids, expected.logprobs, strict=True
    ):
        if ours != theirs:
            values = {token: entry.logprob for token, entry in logprobs.items()}
            assert abs(values[ours] - values[theirs]) < NEAR_TIE
            return


@pytest.mark.parametrize("name", ["greedy", "preempted"])
def test_generation_is_the_cpus(checkpoint: Path, name: str) -> None:
    on_device = make_llm(checkpoint, name, DEVICE)
    assert on_device.model_info.device == "cuda:0"
    found = workload.generate(name, on_device, logprobs=2)
    expected = workload.generate(name, make_llm(checkpoint, name, "cpu"), logprobs=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_choices(ours.outputs[0], theirs.outputs[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", workload.NAMES)
def test_generation_runs_and_repeats(checkpoint: Path, name: str, dtype: str) -> None:
    first, again = (
        workload.generate(name, make_llm(checkpoint, name, DEVICE, dtype=dtype)) for _ in range(2)
    )
    for one, other in zip(first, again, strict=True):
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]


def test_reference_mode_ignores_the_batch(checkpoint: Path) -> None:
    """Token for token and bit for bit, as on the CPU."""
    llm = make_llm(checkpoint, "greedy", DEVICE, reference=True, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=16, logprobs=3, ignore_eos=True)
    together = llm.generate([*workload.PROMPTS], params)
    for prompt, among_others in zip(workload.PROMPTS, together, strict=True):
        (alone,) = llm.generate(prompt, params)
        assert alone.outputs == among_others.outputs


@pytest.mark.parametrize("vocab", [300, 4_096, 128_256])
def test_the_sampler_draws_the_cpus_tokens(vocab: int) -> None:
    chosen: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 5},
        {"temperature": 0.8},
        {"top_k": 40},
        {"top_k": 1_000},
        {"top_p": 0.9, "temperature": 1.5},
        {"top_p": 0.999, "min_p": 1e-4},
        {"min_p": 0.1, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"logit_bias": {5: 3.0}, "min_tokens": 9, "top_p": 0.5},
    ] * 8
    states = [
        make_state(seed=seed, output=(1, 2, 2), **params) for seed, params in enumerate(chosen)
    ]
    logits = torch.randn(len(states), vocab, generator=torch.Generator().manual_seed(4)) * 2
    logits[11] = torch.nan
    found = Sampler().sample(logits.clone().to(DEVICE), states)
    expected = Sampler().sample(logits.clone(), states)
    assert [row.error for row in found] == [row.error for row in expected]
    # Sums in another order may move the end of a token's interval past the number drawn.
    assert sum(a.token != b.token for a, b in zip(found, expected, strict=True)) <= 1
    for ours, theirs in zip(found, expected, strict=True):
        if ours.logprobs is not None and theirs.logprobs is not None:
            assert ours.logprobs.rank == theirs.logprobs.rank == 1
            assert [t for t, _ in ours.logprobs.top] == [t for t, _ in theirs.logprobs.top]


def test_a_row_of_nan_fails_alone(checkpoint: Path) -> None:
    llm = make_llm(checkpoint, "greedy", DEVICE)
    with torch.inference_mode():
        llm.engine.runner._forward.loop._model._embedding[13] = torch.nan  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logit_bias={13: -100})
    broken, good = llm.generate([[1, 2, 13, 4], [5, 6, 7]], params)
    assert broken.error is not None and "NaN" in broken.error
    assert good.error is None and len(good.outputs[0].token_ids) == 8


class TestDevice:
    def test_it_is_the_automatic_choice(self, checkpoint: Path) -> None:
        assert resolve_device("auto").name == "cuda:0"
        llm = LLM(str(checkpoint), max_num_seqs=4)
        assert llm.model_info.device == "cuda:0"
        assert llm.generate([5, 6], SamplingParams(max_tokens=4))[0].outputs[0].token_ids

    def test_it_tells_its_memory(self) -> None:
        device = resolve_device(DEVICE)
        torch.cuda.empty_cache()
        free = device.free_memory()
        taken = torch.empty(1 << 28, dtype=torch.uint8, device=device.name)
        device.synchronize()
        assert 0 < device.free_memory() <= free - taken.numel() // 2

    def test_one_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="cuda:99"):
            resolve_device("cuda:99")
