"""Every architecture is at parity with transformers, whatever the engine does with its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import SamplingParams
from headrace.contracts.cache import layout_of
from headrace.errors import CheckpointError, ConfigurationError
from headrace.json_file import read_json
from headrace.models.base import find_architecture
from tests.models.expected import (
    TOLERANCE,
    Expected,
    difference,
    full_prompt_logprobs,
    greedy,
    load,
    prompt_of,
)
from tests.support.architectures import ARCHITECTURES, RECURRENT, VOCAB, WINDOW, WITH_LLAMA
from tests.support.logits import LogitsRecorder

RECURRENT_TOLERANCE = 1e-3
LONG = 5 * WINDOW


def is_recurrent(name: str) -> bool:
    return name.startswith(RECURRENT)


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return str(request.param)


@pytest.fixture
def expected(name: str, expectations: Callable[[str], Expected]) -> Expected:
    return expectations(name)


@pytest.fixture
def tolerance(name: str) -> float:
    return RECURRENT_TOLERANCE if is_recurrent(name) else TOLERANCE


def cache_bytes(directory: Path, slots: int, block_size: int) -> int:
    """Size of an arena in which ``slots`` slots of all groups fit."""
    config = read_json(directory / "config.json")
    states = find_architecture(config).layer_states(config, "float32")
    return int(layout_of(states, block_size).token_bytes * slots)


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_prefill_and_decode(expected: Expected, tolerance: float, reference: bool) -> None:
    with load(expected.directory, reference=reference) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(LONG)], greedy(12))
    assert difference(expected, recorder, output) < tolerance


def test_ragged_batch_of_chunks_and_decodes(
    name: str, expected: Expected, tolerance: float
) -> None:
    # transformers turns prompts within the original context of LongRoPE in another way than those
    # beyond it, which a cache that outlives them cannot.
    shorter = (21, 23, 29) if "longrope" in name else (1, 3, 9)
    prompts = [prompt_of(length) for length in (*shorter, LONG, 17, 40, 26)]
    with load(expected.directory, max_num_batched_tokens=24, block_size=4) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, [greedy(6 + 2 * i) for i in range(len(prompts))])
    assert any(
        any(row.is_decode for row in step) and any(row.is_chunk for row in step)
        for step in recorder.steps
    )
    for output in outputs:
        assert difference(expected, recorder, output) < tolerance


def test_prefix_cache(
    name: str,
    expected: Expected,
    tolerance: float,
    record_property: Callable[[str, object], None],
) -> None:
    """Pages behind a window are found again as long as nobody needed them."""
    if is_recurrent(name):
        record_property("outcome", "off")
    prefix = prompt_of(LONG)
    with load(expected.directory, block_size=8) as llm:
        recorder = LogitsRecorder(llm)
        llm.generate([prefix], greedy(1))
        outputs = llm.generate([prefix + prompt_of(n) for n in (1, 30)] + [prefix], greedy(5))
    cached = 0 if is_recurrent(name) else (LONG - 1) // 8 * 8
    for output in outputs:
        assert output.metrics is not None and output.metrics.num_cached_tokens == cached
        assert difference(expected, recorder, output) < tolerance


def test_preemption(name: str, expected: Expected, tolerance: float) -> None:
    prompts = [prompt_of(12, seed) for seed in range(4)]
    # Where all layers have windows, sequences do not grow beyond these.
    memory = cache_bytes(expected.directory, 40 if name in ("mistral", "phi3") else 96, 4) or None
    options = {"block_size": 4, "max_num_batched_tokens": 8}
    with load(expected.directory, kv_cache_memory_bytes=memory, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(40))
        # What a sequence of Mamba keeps does not grow: nothing runs out.
        assert (llm.stats().preemptions > 0) == (not name.startswith("mamba2"))
        assert llm.stats().pages_used == 0
    for output in outputs:
        assert difference(expected, recorder, output) < tolerance


def test_completions_that_part(expected: Expected, tolerance: float) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True)
    with load(expected.directory, block_size=8) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(WINDOW + 9)], params)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    assert difference(expected, recorder, output) < tolerance


@pytest.mark.parametrize("name", WITH_LLAMA)
def test_quantized(expected: Expected) -> None:
    """Eight bits change little, and something."""
    prompt = prompt_of(60)
    with load(expected.directory, weights="w8a8") as llm:
        (output,) = llm.generate([prompt], greedy(1, prompt_logprobs=VOCAB))
    wanted = torch.log_softmax(expected.logits(prompt)[:-1], -1)
    found = full_prompt_logprobs(output)
    divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
    assert 0 < divergence < 0.1


def test_bfloat16(expected: Expected) -> None:
    prompt = prompt_of(LONG)
    with load(expected.directory, dtype="bfloat16") as llm:
        (output,) = llm.generate([prompt], greedy(1, prompt_logprobs=VOCAB))
    wanted = torch.log_softmax(expected.logits(prompt)[:-1], -1)
    found = full_prompt_logprobs(output)
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.05


@pytest.mark.parametrize("name", WITH_LLAMA)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_cache(
    name: str, expected: Expected, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    prompt = prompt_of(LONG)
    options = {"dtype": dtype, "kv_cache_dtype": "int8", "max_num_batched_tokens": 24}
    if name.startswith("deepseek"):
        record_property("outcome", "refused")
        with pytest.raises(CheckpointError, match="int8 does not serve latent attention"):
            load(expected.directory, **options)
        return
    with load(expected.directory, **options) as llm:
        (output,) = llm.generate([prompt], greedy(1, prompt_logprobs=VOCAB))
    wanted = torch.log_softmax(expected.logits(prompt)[:-1], -1)
    found = full_prompt_logprobs(output)
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.05


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gemma2", "some here have a window"), ("falcon_h1", "some here have a recurrent state")],
)
def test_policies_need_layers_that_keep_everything(
    expectations: Callable[[str], Expected], name: str, kind: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"random-eviction: needs .* {kind}"):
        load(expectations(name).directory, kv="random-eviction:keep=0.5")


def test_windows_free_their_pages(expectations: Callable[[str], Expected]) -> None:
    """Of a sequence many windows long, no more is held than a window and a chunk."""
    expected = expectations("mistral")
    options: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 8}
    with load(expected.directory, enable_prefix_caching=False, **options) as llm:
        llm.generate([prompt_of(10 * WINDOW)], greedy(30))
        assert llm.stats().pages_peak <= (WINDOW + 8) // 4 + 2


def test_latent_attention_caches_the_latent_alone(expectations: Callable[[str], Expected]) -> None:
    directory = expectations("deepseek_v3").directory
    config = read_json(directory / "config.json")
    states = find_architecture(config).layer_states(config, "bfloat16")
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert [[p.slot_bytes for p in state.planes] for state in states] == [[2 * width]] * 2
    with load(directory) as llm:
        assert llm.model_info.kv_token_bytes == 2 * width * 4
