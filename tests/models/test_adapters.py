"""Adapters beside the model give what models with the adapters merged into them give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace import LLM
from headrace.errors import CheckpointError, InvalidRequestError
from tests.models.expected import TOLERANCE, Expected, difference, greedy, load, prompt_of
from tests.models.test_architectures import RECURRENT_TOLERANCE
from tests.models.test_mutations import NOTICED
from tests.support.adapters import write_adapter, write_factors
from tests.support.architectures import WITH_LLAMA
from tests.support.checkpoints import copy_checkpoint, edit_tensors
from tests.support.logits import LogitsRecorder

Tensors = dict[str, torch.Tensor]


def merge(base: Path, adapter: Path, directory: Path, scale: float = 2.0) -> Path:
    """The checkpoint with an adapter in its weights."""
    factors = load_file(adapter / "adapter_model.safetensors")

    def edit(tensors: Tensors) -> Tensors:
        for name in tensors:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in factors:
                up, down = factors[f"{stem}.lora_B.weight"], factors[f"{stem}.lora_A.weight"]
                added = scale * up @ down
                transposed = ".c_" in name  # GPT-2's weights
                tensors[name] = tensors[name] + (added.T if transposed else added)
        return tensors

    return edit_tensors(copy_checkpoint(base, directory), edit)


@pytest.fixture(params=["llama-biases", "qwen3-tied"])
def base(request: pytest.FixtureRequest, expectations: Callable[[str], Expected]) -> Path:
    return expectations(request.param).directory


def logprobs_of(llm: LLM, prompts: list[list[int]], **options: Any) -> list[torch.Tensor]:
    """Log-probabilities of all prompts' tokens, batched."""
    outputs = llm.generate(prompts, greedy(4, prompt_logprobs=0), **options)
    found = []
    for output in outputs:
        assert output.error is None and output.prompt_logprobs is not None
        entries = output.prompt_logprobs[1:]
        tokens = output.prompt_token_ids[1:]
        values = [entry[t].logprob for entry, t in zip(entries, tokens, strict=True) if entry]
        found.append(torch.tensor([*values, *map(float, output.outputs[0].token_ids)]))
    return found


def test_a_batch_of_eight_adapters_equals_eight_merged_models(base: Path, tmp_path: Path) -> None:
    adapters = {f"a{i}": write_adapter(base, tmp_path / f"a{i}", i) for i in range(8)}
    prompts = [prompt_of(30 + i, i) for i in range(10)]
    names = [*adapters, None, "a3"]
    options: dict[str, Any] = {"max_num_batched_tokens": 64, "block_size": 4}
    with load(base, adapters=adapters, **options) as llm:
        together = logprobs_of(llm, prompts, adapter=names)
    for prompt, name, found in zip(prompts, names, together, strict=True):
        merged = base if name is None else tmp_path / f"merged-{name}"
        if name is not None and not merged.exists():
            merge(base, adapters[name], merged)
        with load(merged) as llm:
            (wanted,) = logprobs_of(llm, [prompt])
        assert (found - wanted).abs().max() < TOLERANCE


def test_adapters_share_no_pages(base: Path, tmp_path: Path) -> None:
    adapters = {f"a{i}": write_adapter(base, tmp_path / f"a{i}", i) for i in range(2)}
    prompt = prompt_of(40)
    with load(base, adapters=adapters, block_size=8) as llm:
        cached = []
        for name in (None, "a0", "a1", "a0", None):
            (output,) = llm.generate([prompt], greedy(2), adapter=name)
            assert output.metrics is not None
            cached.append(output.metrics.num_cached_tokens)
        llm.load_adapter("a0", write_adapter(base, tmp_path / "new", 7))
        (output,) = llm.generate([prompt], greedy(2), adapter="a0")
        assert output.metrics is not None
        cached.append(output.metrics.num_cached_tokens)
    assert cached == [0, 0, 0, 32, 32, 0]


def test_loading_and_unloading(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "a", 1)
    prompt = prompt_of(20)
    with load(base) as llm:
        plain = logprobs_of(llm, [prompt])[0]
        llm.load_adapter("a", adapter)
        assert (logprobs_of(llm, [prompt], adapter="a")[0] - plain).abs().max() > 0.01
        assert torch.equal(logprobs_of(llm, [prompt])[0], plain)
        llm.unload_adapter("a")
        with pytest.raises(InvalidRequestError, match="'a' is not loaded"):
            llm.generate([prompt], greedy(1), adapter="a")
        with pytest.raises(InvalidRequestError, match="'a' is not loaded"):
            llm.unload_adapter("a")


@pytest.mark.parametrize(
    ("changed", "scale"),
    [
        ({"use_rslora": True, "lora_alpha": 3}, 3 / math.sqrt(4)),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {".*": 6}}, 1.5),
    ],
)
def test_scales(base: Path, tmp_path: Path, changed: dict[str, Any], scale: float) -> None:
    adapter = write_adapter(base, tmp_path / "a", 2, **changed)
    merged = merge(base, adapter, tmp_path / "merged", scale)
    prompt = prompt_of(25)
    with load(base, adapters={"a": adapter}) as llm:
        found = logprobs_of(llm, [prompt], adapter="a")[0]
    with load(merged) as llm:
        assert (logprobs_of(llm, [prompt])[0] - found).abs().max() < TOLERANCE


def test_quantized_weights_take_adapters(base: Path, tmp_path: Path) -> None:
    """The addition is as large as beside plain weights."""
    adapter = write_adapter(base, tmp_path / "a", 1)
    prompt = prompt_of(40)
    changes = []
    for weights in ("auto", "w8a8"):
        with load(base, adapters={"a": adapter}, dtype="bfloat16", weights=weights) as llm:
            plain, adapted = (logprobs_of(llm, [prompt], adapter=n)[0][:39] for n in (None, "a"))
            changes.append(adapted - plain)
    assert (changes[0] - changes[1]).abs().mean() < 0.2 * changes[0].abs().mean()


def test_logits_of_an_adapter(expectations: Callable[[str], Expected], tmp_path: Path) -> None:
    """Against transformers itself, on decodes."""
    expected = expectations("llama3")
    adapter = write_adapter(expected.directory, tmp_path / "a", 3)
    merged = merge(expected.directory, adapter, tmp_path / "merged")
    theirs = Expected(type(expected.model).from_pretrained(merged).eval(), merged)
    with load(expected.directory, adapters={"a": adapter}) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(50)], greedy(8), adapter="a")
    assert difference(theirs, recorder, output) < TOLERANCE


@pytest.mark.parametrize("name", WITH_LLAMA)
def test_every_architecture(
    name: str, expectations: Callable[[str], Expected], tmp_path: Path
) -> None:
    """Whatever can be adapted is; rows of some weights are in another order than stored."""
    expected = expectations(name)
    with load(expected.directory) as llm:
        adapter = write_factors(llm.adapters._bank._shapes, tmp_path / "a", 1)
    merged = merge(expected.directory, adapter, tmp_path / "merged")
    theirs = Expected(type(expected.model).from_pretrained(merged).eval(), merged)
    with load(expected.directory, adapters={"a": adapter}) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(50)], greedy(4), adapter="a")
    assert difference(expected, recorder, output) > NOTICED
    assert difference(theirs, recorder, output) < RECURRENT_TOLERANCE


@pytest.mark.parametrize("stored", ["", "transformer."])
@pytest.mark.parametrize("adapted", ["", "transformer."])
def test_names_with_their_first_part_or_without(
    expectations: Callable[[str], Expected], tmp_path: Path, stored: str, adapted: str
) -> None:
    """A checkpoint and an adapter may come from different classes of transformers."""
    whole = expectations("gpt2").directory
    with load(whole) as llm:
        shapes = llm.adapters._bank._shapes
    prompt = prompt_of(20)
    with load(whole, adapters={"a": write_factors(shapes, tmp_path / "whole", 1)}) as llm:
        (wanted,) = logprobs_of(llm, [prompt], adapter="a")

    def rename(names: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {prefix + name.removeprefix("transformer."): each for name, each in names.items()}

    directory = copy_checkpoint(whole, tmp_path / "stored")
    edit_tensors(directory, lambda tensors: rename(tensors, stored))
    adapter = write_factors(rename(shapes, adapted), tmp_path / "a", 1)
    with load(directory, adapters={"a": adapter}) as llm:
        (found,) = logprobs_of(llm, [prompt], adapter="a")
    assert torch.equal(found, wanted)


class TestRefusals:
    """What is no adapter for the model is refused when it is loaded; others stay."""

    @pytest.fixture
    def llm(self, base: Path) -> LLM:
        return load(base)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type"),
            ({"use_dora": True}, "use_dora"),
            ({"bias": "all"}, "bias"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"r": "four"}, "r and lora_alpha"),
        ],
    )
    def test_kinds(
        self, llm: LLM, base: Path, tmp_path: Path, changed: dict[str, Any], message: str
    ) -> None:
        adapter = write_adapter(base, tmp_path / "a", 1, **changed)
        with pytest.raises(CheckpointError, match=message):
            llm.load_adapter("a", adapter)
        assert llm.adapters.directories == {}

    def test_another_model(self, llm: LLM, base: Path, tmp_path: Path) -> None:
        adapter = write_adapter(base, tmp_path / "a", 1)
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        other = {name.replace("q_proj", "query"): t for name, t in tensors.items()}
        save_file(other, file)
        with pytest.raises(CheckpointError, match="another model"):
            llm.load_adapter("a", adapter)
        cut = {n: t[:, :-1] if n.endswith("lora_A.weight") else t for n, t in tensors.items()}
        save_file({name: tensor.contiguous() for name, tensor in cut.items()}, file)
        with pytest.raises(CheckpointError, match="another model"):
            llm.load_adapter("a", adapter)

    def test_files(self, llm: LLM, base: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"adapter_config\.json does not exist"):
            llm.load_adapter("a", tmp_path)
        adapter = write_adapter(base, tmp_path / "a", 1)
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="truncated"):
            llm.load_adapter("a", adapter)
        file.rename(adapter / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="pickle"):
            llm.load_adapter("a", adapter)
