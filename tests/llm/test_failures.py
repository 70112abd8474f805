"""What fails while it runs: that request alone, with nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace import LLM, SamplingParams
from tests.llm.conftest import MakeLLM, check_idle

POISON = 999
"""The token whose embedding is NaN."""

NAN = "no token can be drawn: the logits are not finite"
HEALTHY = [list(range(64 + i, 64 + i + length)) for i, length in enumerate((5, 33, 18, 47))]
PAGES = {"kv_cache_memory_bytes": 16 * 16 * 4096, "max_model_len": 128}


def params(**options: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "logprobs": 0, **options}
    )


@pytest.fixture(scope="module")
def poisoned(embedded_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, but one token's embedding is NaN. Its output layer is whole."""
    directory = tmp_path_factory.mktemp("models") / "poisoned"
    shutil.copytree(embedded_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = {k: v.clone() for k, v in load_file(directory / "model.safetensors").items()}
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    embedding[POISON] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("chunks", [512, 16])
def test_nan_fails_one_request_and_changes_no_other(
    make_llm: MakeLLM, poisoned: Path, chunks: int
) -> None:
    llm = make_llm(model=str(poisoned), max_num_batched_tokens=chunks)
    alone = [llm.generate(prompt, params())[0] for prompt in HEALTHY]
    bad = [64, 65, POISON, *range(70, 110)]
    results = llm.generate([HEALTHY[0], bad, *HEALTHY[1:], bad[:5]], params())
    errors = [result.error for result in results]
    assert [error is None for error in errors] == [True, False, True, True, True, False]
    assert all(error.startswith(NAN) for error in errors if error)
    failed = results[1]
    assert failed.finished and failed.outputs[0].finish_reason == "error"
    assert failed.outputs[0].token_ids == [] and failed.outputs[0].text == ""
    kept = [result for result in results if result.error is None]
    assert [r.outputs for r in kept] == [r.outputs for r in alone]
    assert llm.stats().failed == 2


def test_nan_of_a_scored_prompt_fails_it(make_llm: MakeLLM, poisoned: Path) -> None:
    llm = make_llm(model=str(poisoned))
    good, bad = llm.generate(
        [[64, 65, 66], [64, POISON, 66]], params(max_tokens=0, prompt_logprobs=1)
    )
    assert good.error is None and good.prompt_logprobs is not None
    assert bad.error is not None and "not finite" in bad.error


def test_one_bad_completion_of_several_ends_the_request(make_llm: MakeLLM, poisoned: Path) -> None:
    """A sampled token whose embedding is NaN: the next step of that completion fails."""
    llm = make_llm(model=str(poisoned))
    forced = params(logit_bias={POISON: 100.0}, n=2)
    result, other = llm.generate([HEALTHY[0], HEALTHY[1]], [forced, params()])
    assert result.error is not None and result.finished
    assert [c.token_ids for c in result.outputs] == [[POISON], [POISON]]
    assert [c.finish_reason for c in result.outputs] == ["error", "error"]
    assert other.outputs == llm.generate(HEALTHY[1], params())[0].outputs


@pytest.mark.parametrize("mode", ["reference", "float32", "bfloat16"])
def test_pages_of_a_failed_request_serve_later_ones(
    make_llm: MakeLLM, poisoned: Path, mode: str
) -> None:
    """NaN that is left in freed pages must reach nobody, not even through padding."""
    reference = mode == "reference"
    llm = make_llm(
        model=str(poisoned),
        reference=reference,
        dtype="auto" if reference else mode,
        enable_prefix_caching=False,
        max_num_batched_tokens=24,
        **PAGES,
    )
    clean = [result.outputs for result in llm.generate(HEALTHY, params())]
    arena = llm.engine.runner.arena
    pages = arena.pages
    bad = [[POISON] + [64 + i] * 110 for i in range(2)]
    assert all(result.error for result in llm.generate(bad, params()))
    assert int(pages.view(arena.plane(0, "key").dtype).isnan().any(dim=1).sum()) >= 7, (
        "freed pages hold NaN"
    )
    assert [result.outputs for result in llm.generate(HEALTHY, params())] == clean
    pages.fill_(255)
    assert [result.outputs for result in llm.generate(HEALTHY, params())] == clean


class Trip:
    """Raises in the ``after``-th call of a method."""

    def __init__(self, method: Callable[..., Any], after: int, error: BaseException) -> None:
        self._method = method
        self._left = after
        self._error = error

    def __call__(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return self._method(*arguments)


def trip(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, after: int, error: BaseException
) -> None:
    monkeypatch.setattr(owner, name, Trip(getattr(owner, name), after, error))


PLACES: dict[str, Callable[[LLM], tuple[object, str]]] = {
    "copies": lambda llm: (llm.engine.runner.arena, "blank_pages"),
    "layers": lambda llm: (llm.engine.runner._forward.loop, "run"),
    "sampler": lambda llm: (llm.engine.runner.sampler, "sample"),
    "collect": lambda llm: (llm.engine.runner, "collect"),
}


@pytest.fixture
def crowded(make_llm: MakeLLM) -> LLM:
    """Two rows for four prompts."""
    return make_llm(max_num_seqs=2, max_num_batched_tokens=128)


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_in_a_step_fails_only_its_requests(
    crowded: LLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    clean = crowded.generate(HEALTHY, params())
    owner, name = PLACES[place](crowded)
    with monkeypatch.context() as patch:
        trip(patch, owner, name, 3, RuntimeError("out of luck"))
        results = crowded.generate(HEALTHY, params())
    errors = [result.error for result in results]
    assert errors == ["RuntimeError: out of luck"] * 2 + [None] * 2
    assert [result.outputs for result in results[2:]] == [r.outputs for r in clean[2:]]
    assert crowded.stats().failed == 2
    check_idle(crowded.engine)
    again = crowded.generate(HEALTHY, params())
    assert [result.outputs for result in again] == [result.outputs for result in clean]


@pytest.mark.parametrize("place", PLACES)
def test_interrupting_a_call_leaves_nothing_behind(
    crowded: LLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    clean = crowded.generate(HEALTHY, params())
    owner, name = PLACES[place](crowded)
    with monkeypatch.context() as patch:
        trip(patch, owner, name, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            crowded.generate(HEALTHY, params())
    assert crowded.stats().pages_used == crowded.stats().running == crowded.stats().waiting == 0
    crowded.engine.check_integrity()
    again = crowded.generate(HEALTHY, params())
    assert [result.outputs for result in again] == [result.outputs for result in clean]


def test_a_failing_row_beside_scores(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    trip(monkeypatch, llm.engine.runner, "_score", 2, torch.OutOfMemoryError("no memory"))
    (result,) = llm.generate(HEALTHY[1], params(prompt_logprobs=1))
    assert result.error == "OutOfMemoryError: no memory"
    assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == len(HEALTHY[1])
